"""A run that is killed, and goes on; and the norms beside Linf."""

from __future__ import annotations

import json

import pytest

import sparring
from sparring.core.threat import L1, L2, Linf

LIMIT = Linf(0.15)
HOW = {"profile": "quick", "net": "dense", "steps": 105, "limit": 10, "draws": 2}


class Killed(BaseException):
    """What nobody catches."""


def without_times(result):
    rows = [{**row, "training_cost": 0, "inference_cost": 0} for row in result.rows]
    return json.loads(json.dumps({**result.figures, "defenses": rows, "run": ""}))


def test_killed_anywhere_it_ends_with_the_same_table(digits_set, tmp_path):
    chosen = ["distillation", "random_resize_pad"]
    calls = []
    whole = sparring.defend(
        digits_set, LIMIT, defenses=chosen, out=tmp_path / "whole", tell=lambda *a: calls.append(a), **HOW
    )
    kills = 0
    for share in (0.1, 0.3, 0.45, 0.6, 0.75, 0.9):
        moment = calls[int(share * len(calls))]

        def tell(*now):
            if now == moment:  # noqa: B023  it is called before the next turn
                raise Killed

        try:
            sparring.defend(digits_set, LIMIT, defenses=chosen, out=tmp_path / "cut", tell=tell, **HOW)
        except Killed:
            kills += 1
    assert kills >= 5
    again = sparring.defend(digits_set, LIMIT, defenses=chosen, out=tmp_path / "cut", **HOW)
    assert without_times(again) == without_times(whole)
    told: list[str] = []
    last = sparring.defend(
        digits_set, LIMIT, defenses=chosen, out=tmp_path / "cut", tell=lambda what, *_: told.append(what), **HOW
    )
    assert last.rows == again.rows  # the costs too: nothing is done twice
    work = ("training", "fgsm on", "pgd on", "mifgsm on")
    assert not [what for what in told if what.startswith(work) or what.endswith("labels only")]


@pytest.mark.parametrize("threat", [L2(0.8), L1(2.0)])
def test_other_norms(threat, digits_set):
    result = sparring.defend(digits_set, threat, defenses=[], **HOW | {"limit": 3})
    for row in result.rows:
        stages = [one["stage"] for one in row["details"]["tried"]]
        assert ("naive: fgsm" in stages) == (threat.norm == "l2")
        assert ("labels only: hopskipjump" in stages) == (threat.norm == "l2")
        assert row["adaptive"] <= row["naive"]
