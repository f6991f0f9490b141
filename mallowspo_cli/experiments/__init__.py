"""Claims about the method, each put to the test by one command."""
