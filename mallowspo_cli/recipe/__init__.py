"""Recipes: one readable YAML file, composed by Hydra into one tree of dataclasses."""
