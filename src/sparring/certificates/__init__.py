"""Proofs that no image of a threat model changes the label."""
