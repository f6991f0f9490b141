"""The reference pass: once per model and data, on disk, keyed by content."""
