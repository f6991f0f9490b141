"""Bandits with a known dispersion: does the method collapse less, and trade off better?"""
