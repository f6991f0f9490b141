"""Judges of pairs of answers: what they are asked, how, and what their answers mean."""
