"""Images that broke one defense, tried on the others: on rows and images made by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparring.auditing.run import Run
from sparring.core.threat import Linf
from sparring.core.verdict import Verdict
from sparring.data.images import Images
from sparring.defending import borrowed
from sparring.defending.bench import Bench
from sparring.defending.borrowed import borrow
from sparring.defending.deployed import Deployed
from sparring.defending.measure import Measured
from sparring.defending.plan import Entry
from sparring.defending.row import pictures, signs, tried
from sparring.defending.workshop import Subject

EPS = 0.1
MEAN = (0.45, 0.45, 0.45, 0.45, 0.2)  # all of class 0, which lies below 0.5; rows 10 to 14


class Half(nn.Module):
    """Class 1 where the mean pixel is above 0.5."""

    def forward(self, x):
        away = x.flatten(1).mean(1) - 0.5
        return torch.stack([-away, away], 1)


def images():
    x = torch.tensor(MEAN).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()
    return Images("made", x, torch.zeros(5, dtype=torch.int64), torch.arange(5) + 10, ("a", "b"))


def measured(name, witnesses, broken=()):
    """A defense that is the net alone; its audit broke the rows `broken` with `witnesses` (id: mean pixel)."""
    all_right = torch.ones(5, dtype=torch.bool)
    nothing = torch.zeros(5, dtype=torch.bool)
    made = {row: torch.full((1, 2, 2), mean) for row, mean in witnesses.items()}
    figures = {"warnings": [], "stages": [{"name": "clean images", "rows": 5, "broken": 0}], "proofs": {}}
    return Measured(
        subject=Subject(Entry(name), "standard", Half().eval(), None, ()),
        deployed=Deployed((), 0.0, all_right, nothing.long(), {}),
        audit=SimpleNamespace(witnesses=lambda: made, warnings=[], figures=figures),
        verdicts=tuple(Verdict.BROKEN if row in broken else Verdict.UNDECIDED for row in images().ids.tolist()),
        labels={"attack": None, "rows": 0, "broke": 0, "why_not": None},
        named=nothing,
        points=images().x,
        curve={},
    )


def found():
    """`a` lost row 12; `b` and `c` lost rows to images of which some break others too."""
    return [
        measured("c", {10: 0.53, 11: 0.54}, (10, 11)),
        measured("a", {12: 0.54}, (12,)),
        # Of b's, one is no error of the net (11), one is not legal (13), one row has no image at all (14).
        measured("b", {10: 0.52, 11: 0.49, 12: 0.53, 13: 0.56}, (10, 11, 12, 13)),
    ]


def bench(path):
    return Bench(Run.create(path, "defend", {}), images(), Linf(EPS), "quick", 0, 20, "cpu", {}, lambda *_: None)


def test_a_row_that_falls_to_an_image_of_another_is_broken(tmp_path):
    c, a, b = borrow(bench(tmp_path), found())
    assert a.borrowed.names == ["a", "b", "c"]
    assert a.borrowed.by.tolist() == [1, 2, -1, -1, -1]  # both break row 10: by name the first; b's 11 breaks nothing
    assert a.borrowed.points[:, 0, 0, 0].tolist() == pytest.approx([0.52, 0.54])
    assert a.held.tolist() == [False, False, False, True, True]
    assert c.borrowed.by.tolist() == [-1, -1, 0, -1, -1]
    assert c.held.tolist() == [False, False, False, True, True]
    assert b.borrowed.by.tolist() == [-1] * 5  # its only row that held has no image
    assert tried(a) == [{"stage": "borrowed: images of others", "rows": 3, "broke": 2}]
    assert a.borrowed.met.tolist() == [2, 2, 0, 1, 0]  # row 12 had fallen before
    assert a.borrowed.lenders == ["b", "c"]
    assert tried(b) == [{"stage": "borrowed: images of others", "rows": 0, "broke": 0}]
    assert signs(a)[0].startswith("borrowed_beats_adaptive: what broke other defenses broke 2 rows that the adaptive")
    assert (a.missed()["borrowed"], signs(b)) == (2, [])


def test_neither_the_order_nor_a_second_time_changes_anything(tmp_path, monkeypatch):
    first = {one.subject.entry.name: one for one in borrow(bench(tmp_path / "one"), found())}
    turned = borrow(bench(tmp_path / "two"), found()[::-1])
    monkeypatch.setattr(borrowed, "_try", None)
    again = borrow(bench(tmp_path / "one"), found())
    for one in (*turned, *again):
        mine = first[one.subject.entry.name].borrowed
        assert torch.equal(one.borrowed.by, mine.by)
        assert torch.equal(one.borrowed.points, mine.points)
        assert torch.equal(one.borrowed.met, mine.met)


def test_what_is_shown_of_such_a_row_is_the_borrowed_image(tmp_path, monkeypatch):
    monkeypatch.setattr(Measured, "decided", lambda _: {12: "sprint"})
    here = replace(bench(tmp_path), crafted={"standard": {"pgd": images().x}})
    _, a, _ = borrow(here, found())
    told, changed = pictures(a, here, torch.tensor([1, 0, 2, 3]))
    assert [one["by"] for one in told] == ["borrowed: c", "borrowed: b", "adaptive: sprint", None]
    assert [one["outcome"] for one in told] == ["broken", "broken", "broken", "undecided"]
    assert [one["adversarial_prediction"] for one in told] == [1, 1, 1, 0]
    assert changed[:, 0, 0, 0].tolist() == pytest.approx([0.54, 0.52, 0.54, 0.45])


def test_all_look_at_what_held_before():
    """A row that one lost to a borrowed image lends none: what is lent are the images of the audits."""
    assert torch.equal(found()[1].held, torch.tensor([True, True, False, True, True]))
    assert "borrowed" not in found()[1].missed()
