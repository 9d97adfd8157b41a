"""Print what pyproject.toml asks for, without the project itself: its dependencies, or those of the extras named."""

import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = [project["optional-dependencies"][name] for name in sys.argv[1:]]
print(*(line for group in extras or [project["dependencies"]] for line in group), sep="\n")
