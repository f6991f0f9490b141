"""MallowsPO: preference fine-tuning with a prompt-dependent dispersion index."""

__version__ = "0.1.0"
