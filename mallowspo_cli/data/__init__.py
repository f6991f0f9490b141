"""Preference pairs: read, told apart by layout, tokenised."""
