"""Classifiers: our own networks, their checkpoints, and adapters for those of others."""
