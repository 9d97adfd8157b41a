"""Train an image classifier, attack it, harden it, and say honestly how robust it now is."""

__version__ = "0.1.0"
