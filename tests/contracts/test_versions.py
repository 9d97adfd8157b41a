"""What every attack does by default, and the version that says so: old results stay comparable only if both move."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparring import catalog

KNOWN = dict(line.split(" ", 1) for line in (Path(__file__).parent / "defaults.txt").read_text().splitlines())


@pytest.mark.parametrize("name", sorted(catalog.attacks()))
def test_the_defaults_are_those_of_the_version(name):
    attack = catalog.attacks()[name]()
    assert f"{attack.version} {attack!r}" == KNOWN[name], f"raise {name}'s version and mend its line in defaults.txt"


def test_no_attack_is_forgotten():
    assert sorted(KNOWN) == sorted(catalog.attacks())
