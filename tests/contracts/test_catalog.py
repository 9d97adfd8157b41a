"""The contract checks, over every attack that the catalogue finds."""

from __future__ import annotations

from dataclasses import fields

import pytest

from sparring import catalog
from sparring.testing import check_attack, check_optimum

ATTACKS = catalog.attacks()


def test_the_catalogue_finds_the_attacks():
    assert {"apgd", "ddn", "fgsm", "fooling", "pgd"} <= set(ATTACKS)
    assert all(name == kind.name for name, kind in ATTACKS.items())


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_every_attack_keeps_the_contract(name):
    kind = ATTACKS[name]
    options = {"steps": 60} if "steps" in {field.name for field in fields(kind)} else {}
    assert check_attack(kind, **options) <= 1  # rows that rounding alone moves at another width


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_every_attack_as_it_comes_reaches_the_optimum(name):
    attack = ATTACKS[name]()
    for norm in set(attack.norms) & {"linf", "l2", "l1", "unbounded"}:
        check_optimum(attack, norm, tolerance=0.02 if attack.minimizes else 0.05)
