"""Ways to train, one a file. Whatever stands here is in the catalogue; attacks come from outside."""
