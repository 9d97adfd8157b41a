"""The commands; each file has one function, `command`, and is found by its name."""
