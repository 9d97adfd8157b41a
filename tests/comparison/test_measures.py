"""Medians, optimality, front and curves, against figures worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparring.attacks.fgsm import FGSM
from sparring.comparison import Comparison, Trial
from sparring.comparison.entry import median
from sparring.core.threat import L2
from sparring.engine.outcome import Outcome

NONE = float("inf")
X = torch.zeros(5, 1, 1, 4)


def trial(name: str, far: list[float], passes: int, survives: int = 0) -> Trial:
    """Five rows: the first is wrong untouched, and the others fall at these L2 distances, along the first pixel."""
    distance = torch.tensor([0.0, *far], dtype=torch.float64)
    found, n = distance.isfinite(), len(distance)
    best = X.clone()
    best[:, 0, 0, 0] = distance.where(found, torch.tensor(0.0)).float()
    clean, count = distance == 0, torch.full((n,), passes)
    score = torch.full((n,), 0.5, dtype=torch.float64)
    outcome = Outcome(
        sample=torch.arange(n),
        clean=clean,
        found=found,
        moved=~found & False,
        failed=~found & False,
        best=best,
        distance=distance.where(found, torch.tensor(0.25, dtype=torch.float64)),  # of a row that held it says nothing
        clean_label=torch.zeros(n, dtype=torch.int64),
        clean_confidence=score,
        label=torch.ones(n, dtype=torch.int64),
        confidence=score,
        forward=count,
        backward=count,
    )
    kept = torch.zeros(n, dtype=torch.bool)
    kept[1 : 1 + survives] = True
    return Trial(name, FGSM(), outcome, kept, 1.5)


@pytest.fixture
def compared():
    trials = [
        trial("near", [0.1, 0.2, 0.3, 0.4], 50, survives=1),
        trial("cheap", [0.2, 0.2, 0.6, NONE], 5),
        trial("beaten", [0.3, 0.3, 0.6, NONE], 6),
        trial("nothing", [NONE] * 4, 5),
        trial("lucky", [NONE, 0.05, NONE, NONE], 200),
    ]
    return Comparison.of(trials, L2(1.0), X)


def test_a_row_that_holds_is_infinitely_far(compared):
    near, cheap, _, nothing, lucky = compared.entries
    assert near.median == near.median_l2 == pytest.approx(0.25)
    assert cheap.median == pytest.approx(0.4)  # of 0.2, 0.2, 0.6 and infinity
    assert nothing.median is None
    assert lucky.median is None
    assert nothing.mean_l2 is None
    assert lucky.mean_l2 == pytest.approx(0.05)
    assert (near.mean_l1, near.mean_l0) == (pytest.approx(0.25), 1.0)
    assert [entry.success for entry in compared.entries] == [1.0, 0.75, 0.75, 0.0, 0.25]


def test_median_of_few():
    assert median(torch.tensor([3.0, 1.0, 2.0]), 3) == 2.0
    assert median(torch.tensor([3.0, 1.0]), 3) == 3.0
    assert median(torch.tensor([1.0]), 2) is None
    assert median(torch.tensor([]), 0) is None


def test_shares_that_survive_storage_are_of_those_that_fell(compared):
    assert compared.entries[0].eight_bit == 0.25
    assert compared.entries[1].eight_bit == 0.0
    assert compared.entries[3].eight_bit is None


def test_optimality_by_hand(compared):
    """The best of all is 0.1, 0.05, 0.3, 0.4 and the curves end at 0.4; finding nothing leaves 4 x 0.4 / 5."""
    best, none = (0.1 + 0.05 + 0.3 + 0.4) / 5, 4 * 0.4 / 5
    areas = [1.0 / 5, (0.2 + 0.2 + 0.4 + 0.4) / 5, (0.3 + 0.3 + 0.4 + 0.4) / 5, none, (0.4 + 0.05 + 0.4 + 0.4) / 5]
    assert compared.reach == 0.4
    assert compared.optimality == pytest.approx([1 - (area - best) / (none - best) for area in areas], abs=1e-6)
    assert compared.optimality[3] == 0.0


def test_the_front_has_whom_no_other_beats(compared):
    assert compared.front == (True, True, False, False, False)


def test_an_attack_that_finds_nothing_is_on_no_front():
    idle = [trial("near", [0.1] * 4, 50), trial("nothing", [NONE] * 4, 1)]
    assert Comparison.of(idle, L2(1.0), X).front == (True, False)


def test_equals_stand_on_the_front_together():
    same = [trial("one", [0.1] * 4, 5), trial("two", [0.1] * 4, 5)]
    assert Comparison.of(same, L2(1.0), X).front == (True, True)


def test_curves_are_shares_of_rows_farther_away(compared):
    near, cheap, *_, nothing, lucky, best = compared.curve([0.0, 0.05, 0.1, 0.2, 0.4])
    assert near == pytest.approx([0.8, 0.8, 0.6, 0.4, 0.0])
    assert cheap == pytest.approx([0.8, 0.8, 0.8, 0.4, 0.4])
    assert nothing == [0.8] * 5
    assert lucky == pytest.approx([0.8, 0.6, 0.6, 0.6, 0.6])
    assert best == pytest.approx([0.8, 0.6, 0.4, 0.4, 0.0])
    summary = compared.summary()
    assert summary["best_median"] == pytest.approx(0.2)
    assert summary["curve"]["eps"][-1] == pytest.approx(0.4)
    assert summary["curve"]["best"][-1] == 0.0


def test_nothing_found_at_all():
    found = Comparison.of([trial("nothing", [NONE] * 4, 5)], L2(1.0), X)
    assert (found.reach, found.optimality, found.robust_accuracy) == (0.0, (None,), pytest.approx(0.8))
    assert found.summary()["curve"] == {"eps": [0.0], "attacks": [[0.8]], "best": [0.8]}


def test_a_trial_comes_back_from_what_was_stored():
    done = trial("near", [0.1, 0.2, NONE, 0.4], 50, survives=1)
    again = Trial.of("near", FGSM(), done.tensors())
    for name, tensor in done.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name
    assert again.seconds == 1.5
    assert replace(again, survives=done.survives, outcome=done.outcome) == done
