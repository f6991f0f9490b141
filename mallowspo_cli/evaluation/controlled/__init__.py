"""Controlled sentiment: reviews, classifiers, reward and KL."""
