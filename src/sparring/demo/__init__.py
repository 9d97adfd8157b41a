"""The whole story on one data set: train, attack, improve, defend. One chapter a file."""
