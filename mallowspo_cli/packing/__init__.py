"""How pairs lie in a forward pass."""
