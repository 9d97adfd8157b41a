"""The attacks, one idea a file. Whatever stands here is in the catalogue."""
