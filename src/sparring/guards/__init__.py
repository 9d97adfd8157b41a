"""Defenses at inference and detectors, one a file. Whatever stands here is in the catalogue."""
