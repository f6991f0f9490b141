"""Model sources, loading, and the log-prob head."""
