"""What is written about the catalogue is what the catalogue holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparring import catalog
from sparring.cli.commands.ls import attack_table

ROOT = Path(__file__).parents[2]


def test_the_table_of_attacks_is_that_of_the_catalogue():
    written = (ROOT / "docs" / "attacks.md").read_text()
    assert written == attack_table(), "write it anew: sparring ls --markdown > docs/attacks.md"


@pytest.mark.parametrize("name", catalog.attacks())
def test_the_readme_names_every_attack(name):
    assert f"`{name}`" in (ROOT / "README.md").read_text()
