"""One file a verb. Heavy imports happen here, behind the command line."""
