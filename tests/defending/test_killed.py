"""A run that is killed, and goes on; and the norms beside Linf."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import sparring
from sparring.core.threat import L1, L2, Linf
from sparring.guards.smoothing import Smoothing

LIMIT = Linf(0.15)
HOW = {"profile": "quick", "net": "dense", "steps": 105, "limit": 10, "draws": 2}


class Killed(BaseException):
    """What nobody catches."""


def without_times(result):
    rows = [{**row, "training_cost": 0, "inference_cost": 0} for row in result.rows]
    return json.loads(json.dumps({**result.figures, "defenses": rows, "run": ""}))


CHOSEN = ["distillation", "random_resize_pad"]


@pytest.fixture(scope="module")
def whole(digits_set):
    """A run that nobody kills, and what it told on the way."""
    calls = []
    return sparring.defend(digits_set, LIMIT, defenses=CHOSEN, tell=lambda *a: calls.append(a), **HOW), calls


def test_the_order_in_which_defenses_are_named_says_nothing(whole, digits_set):
    turned = sparring.defend(digits_set, LIMIT, defenses=CHOSEN[::-1], **HOW)
    assert without_times(turned) == without_times(whole[0])


def test_killed_anywhere_it_ends_with_the_same_table(whole, digits_set, tmp_path):
    (whole, calls), chosen = whole, CHOSEN
    kills, last = 0, next(call for call in calls if call[:2] == ("images that broke others", 2))
    for moment in (*(calls[int(share * len(calls))] for share in (0.1, 0.3, 0.45, 0.6, 0.75, 0.9)), last):

        def tell(*now):
            if now == moment:  # noqa: B023  it is called before the next turn
                raise Killed

        try:
            sparring.defend(digits_set, LIMIT, defenses=chosen, out=tmp_path / "cut", tell=tell, **HOW)
        except Killed:
            kills += 1
    assert kills >= 6
    again = sparring.defend(digits_set, LIMIT, defenses=chosen, out=tmp_path / "cut", **HOW)
    assert without_times(again) == without_times(whole)
    told: list[str] = []
    last = sparring.defend(
        digits_set, LIMIT, defenses=chosen, out=tmp_path / "cut", tell=lambda what, *_: told.append(what), **HOW
    )
    assert last.rows == again.rows  # the costs too: nothing is done twice
    work = ("training", "fgsm on", "pgd on", "mifgsm on")
    assert not [what for what in told if what.startswith(work) or what.endswith("labels only")]


@dataclass(frozen=True)
class Uniform(Smoothing):
    """Says that its noise is Gaussian."""

    name: ClassVar[str] = "uniform"

    def transform(self, x):
        return x + self.sigma * (torch.rand(x.shape[1:]) - 0.5)


@pytest.fixture(scope="module")
def in_l2(digits_set):
    return sparring.defend(digits_set, L2(0.2), defenses=["smoothing", Uniform()], **HOW | {"limit": 3})


def test_only_what_is_gaussian_noise_is_certified_by_smoothing(in_l2):
    told = {row["defense"]: row["details"]["smoothed"] for row in in_l2.rows}
    assert [name for name in told if told[name] is not None] == ["smoothing"]
    assert told["smoothing"]["rows"] == 3
    assert told["smoothing"]["largest_radius"] == pytest.approx(0.615, abs=1e-3)
    assert in_l2.row("smoothing")["certified"] is None
    assert any(sign.startswith("false_claim: uniform claims gaussian") for sign in in_l2.row("uniform")["signs"])


def test_other_norms(in_l2, digits_set):
    in_l1 = sparring.defend(digits_set, L1(2.0), defenses=[], **HOW | {"limit": 3})
    for norm, result in (("l2", in_l2), ("l1", in_l1)):
        for row in result.rows:
            stages = [one["stage"] for one in row["details"]["tried"]]
            assert ("naive: fgsm" in stages) == (norm == "l2")
            assert ("labels only: hopskipjump" in stages) == (norm == "l2")
            assert row["adaptive"] <= row["naive"]
