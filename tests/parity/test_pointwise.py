"""Pointwise: point for point beside a plain reference, and that nothing more can be set back."""

from __future__ import annotations

import math

import pytest
import torch

from sparring.attacks.pointwise import Pointwise
from sparring.core import noise
from sparring.core.model import Access
from sparring.core.threat import threat
from sparring.engine.loop import run
from sparring.testing import Probe, puzzle


def reference(x0, key):
    """The search with plain loops, one row: yields where to ask, is sent whether it fooled."""
    begun = count = 0
    while True:
        draw = noise.uniform(key, x0.shape, 2 * begun)[0]
        share = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)[begun % 5]
        best = x0.clone()
        for i in range(len(x0)):
            if draw[i] < share:
                best[i] = 0.0 if draw[i] < share / 2 else 1.0
        begun, count = begun + 1, count + 1
        if not (yield best):
            continue
        size, gained = int((best != x0).sum()), True
        while size > 1 or gained:
            size, gained = max(1, math.ceil(size / 2)), False
            u = noise.uniform(key, x0.shape, 2 * count + 1)[0].tolist()
            visit = sorted((i for i in range(len(x0)) if best[i] != x0[i]), key=lambda i: u[i])
            for first in range(0, len(visit), size):
                x = best.clone()
                for i in visit[first : first + size]:
                    x[i] = x0[i]
                count += 1
                if (yield x):
                    best, gained = x, True


@pytest.mark.parametrize("targeted", [False, True])
def test_every_point_is_that_of_the_reference(targeted, states):
    case, rounds = puzzle("l0", targeted=targeted), 0
    for row in range(6):
        beside = reference(case.x[row].flatten(), torch.tensor([77 + row]))
        point = next(beside)
        for state, fooled in states(Pointwise(steps=300), case, row):
            if not state.done:
                assert torch.equal(state.x.flatten(), point)
                point = beside.send(fooled)
        rounds += int(state.begun)
    assert rounds > 30


def only(needed: int) -> Probe:
    """Fooled where at least `needed` of the first `needed + 3` features are above a half."""

    def logits(flat):
        high = (flat[:, : needed + 3] > 0.5).double().sum(1) - needed + 0.5
        return torch.stack([-high, high], 1) + 0 * flat[:, :2]

    return Probe(logits)


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("needed", [1, 2, 5])
@pytest.mark.parametrize("shape", [(1, 5, 5), (3, 4, 4), (1, 14, 14)])
def test_it_finds_the_fewest(shape, needed, rows):
    x = 0.4 * noise.uniform(torch.arange(rows), shape)
    y = torch.zeros(rows, dtype=torch.int64)
    got = run(only(needed), Pointwise(steps=400), threat("l0", 300.0), x, y)
    assert got.distance.tolist() == [needed] * rows
    assert got.forward.tolist() == [401] * rows
    assert run(only(needed), Pointwise(steps=400), threat("l0", needed), x, y).found.all()
    assert not run(only(needed), Pointwise(steps=400), threat("l0", needed - 0.5), x, y).found.any()


def test_halving_spends_a_fraction_of_one_by_one():
    """Few of many features matter: about 2 needed log2(d / needed) queries instead of d."""
    x, y = torch.full((1, 1, 28, 28), 0.2), torch.zeros(1, dtype=torch.int64)
    got = run(only(3), Pointwise(steps=120), threat("l0", 784.0), x, y)
    assert got.distance.tolist() == [3]


def test_no_changed_feature_of_what_it_finds_can_be_set_back():
    case = puzzle("l0")
    got = run(case.model, Pointwise(steps=1500), threat("l0", 20.0), case.x, case.y)
    assert got.found.all()
    for row in range(len(case.x)):
        for feature in (got.best[row] != case.x[row]).flatten().nonzero().squeeze(1).tolist():
            back = got.best[row].flatten().clone()
            back[feature] = case.x[row].flatten()[feature]
            label = case.model.query(back.view(1, *case.x.shape[1:]), Access.DECISION).labels
            assert label.item() == case.y[row].item()
