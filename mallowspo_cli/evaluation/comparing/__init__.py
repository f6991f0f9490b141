"""Whether one model is better than another, and how sure that is."""
