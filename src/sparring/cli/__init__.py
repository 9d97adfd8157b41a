"""The command line: one command a file, each as thin as it can be."""
