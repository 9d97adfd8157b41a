"""Findings as a table: counts of rows in, a word out."""

from __future__ import annotations

import pytest

from sparring.auditing.intervals import clopper_pearson
from sparring.defending.finding import BREAKS, COSTS, HIDES, HOLDS, REFERENCE, Counts, difference, judge


def counts(naive, adaptive, *, right=95, rows=100, base=0, lost=0, won=0, given=0):
    """A defense of `rows` rows beside an undefended net that holds on `base` of them."""
    return Counts(rows, right, naive, adaptive, adaptive - base + given, given, lost, won)


CASES = {
    "hardened": (counts(72, 68, right=92, lost=4, won=1), HOLDS),
    "hardened, and naive by far too kind, but more is left than went": (counts(80, 50, lost=2), HOLDS),
    "more than half of what it seemed to give is gone": (counts(80, 39, lost=2), HIDES),
    "distilled": (counts(78, 0, right=90, lost=6, won=1), HIDES),
    "nothing is left of what seemed a fifth": (counts(20, 0), HIDES),
    "nothing is left, but it seemed little": (counts(15, 0), BREAKS),
    "a strong attack finds more than a short one": (counts(36, 9, rows=360, right=320), BREAKS),
    "compressed, and the attack did not even notice": (counts(0, 0, lost=1), BREAKS),
    "robust where it is wrong without an attack": (counts(24, 24, right=60, lost=36, won=1), COSTS),
    "as much lost as gained": (counts(30, 30, right=65, lost=30), COSTS),
    "a little less lost than gained": (counts(30, 30, right=66, lost=29), HOLDS),
    "a tenth more: surely something, but not surely more than one row in twenty": (counts(10, 10), BREAKS),
    "at an eps that hurts nobody": (counts(94, 93, base=93), COSTS),
    "at an eps that hurts half, nothing gained": (counts(47, 46, base=46, given=3), BREAKS),
    "worse than nothing": (counts(5, 5, base=20, given=20), BREAKS),
    "many rows make a small gain sure": (counts(1000, 1000, right=9500, rows=10000, lost=10), HOLDS),
    "the same share of few rows is not": (counts(10, 10, right=95, rows=100, lost=0), BREAKS),
    "nothing is right": (counts(0, 0, right=0, lost=95), BREAKS),
    "no rows": (Counts(0, 0, 0, 0, 0, 0, 0, 0), BREAKS),
}


@pytest.mark.parametrize(("given", "word"), CASES.values(), ids=CASES)
def test_the_word(given, word):
    assert judge(given).word == word


@pytest.mark.parametrize("given", [case[0] for case in CASES.values()])
def test_the_undefended_net_is_no_defense(given):
    assert judge(given, reference=True).word == REFERENCE


@pytest.mark.parametrize("given", [case[0] for case in CASES.values()])
def test_no_sentence_has_the_naive_figure_without_the_adaptive_one(given):
    for reference in (False, True):
        said = judge(given, reference=reference).sentence
        rows = max(given.rows, 1)
        naive, adaptive = (f"{100 * part / rows:.1f} %" for part in (given.naive, given.adaptive))
        assert naive in said
        assert adaptive in said


def test_illusion_gain_and_price_by_hand():
    found = judge(counts(80, 39, base=10, given=4, lost=7, won=2))
    assert found.illusion.value == pytest.approx(0.41)
    assert (found.illusion.low, found.illusion.high) == clopper_pearson(41, 100)
    assert found.gain.value == pytest.approx(0.29)
    assert found.price.value == pytest.approx(0.05)


def test_what_is_less_is_not_called_more():
    gained = judge(counts(80, 79, base=10, lost=7, won=9)).sentence
    assert "79.0 % hold, 69.0 % (53.2 % to 78.9 %) more than undefended" in gained
    assert gained.endswith("with a clean accuracy 2.0 % (-11.3 % to 15.0 %) higher")
    lost = judge(counts(5, 5, base=20, given=20)).sentence
    assert "15.0 % (-0.5 % to 29.1 %) less than undefended" in lost
    few = judge(counts(12, 12))
    assert few.word == BREAKS
    assert few.sentence.endswith("more than undefended: perhaps too little to speak of")
    assert lost.endswith("undefended: too little to speak of")
    share = difference(10, 30, 100)
    back = difference(30, 10, 100)
    assert share.than("more", "less") == f"{back} less"
    assert back.than("more", "less") == f"{back} more"


def test_an_interval_of_a_difference_is_made_of_both_counts_at_half_the_error():
    share = difference(30, 10, 100)
    (low, high), (least, most) = clopper_pearson(30, 100, 0.975), clopper_pearson(10, 100, 0.975)
    assert (share.low, share.high) == (low - most, high - least)
    assert share.low < 0.2 < share.high


def test_the_interval_of_a_difference_covers():
    """Drawn 400 times from known shares, the truth lies outside in 5 of 100 at most, up to the draws' own noise."""
    import torch

    generator = torch.Generator().manual_seed(0)
    plus, minus, rows, out = 0.25, 0.1, 60, 0
    for _ in range(400):
        u = torch.rand(rows, generator=generator)
        share = difference(int((u < plus).sum()), int((u > 1 - minus).sum()), rows)
        out += not share.low <= plus - minus <= share.high
    assert out <= 30
