"""Training a network of ours: one loop, any defense, resumable."""
