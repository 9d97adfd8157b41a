"""RayS: point for point beside a plain reference, and the closed form on linear models."""

from __future__ import annotations

import math

import pytest
import torch

from sparring.attacks.rays import RayS
from sparring.core.threat import threat
from sparring.engine.loop import run
from sparring.testing import Probe, Puzzle, linear, puzzle


def reference(x0, bounds, tolerance):
    """Algorithms 1 to 3 in float64, one row: yields where to ask, is sent whether it fooled."""
    d, (low, high) = x0.numel(), bounds
    best = {"signs": torch.ones(d, dtype=torch.float64), "radius": high - low}

    def at(signs, radius):
        return (x0 + radius * signs.view_as(x0)).clamp(low, high)

    def search(signs):
        if not (yield at(signs, best["radius"])):
            return
        no, yes = 0.0, best["radius"]
        while yes - no > tolerance * (high - low):
            middle = (no + yes) / 2
            if (yield at(signs, middle)):
                yes = middle
            else:
                no = middle
        best["signs"], best["radius"] = signs, yes

    yield from search(best["signs"])
    level = 0
    while True:
        size = math.ceil(d / 2**level)
        for first in range(0, d, size):
            signs = best["signs"].clone()
            signs[first : first + size] *= -1
            yield from search(signs)
        level += 1


@pytest.mark.parametrize("targeted", [False, True])
def test_every_point_is_that_of_the_reference(targeted, states):
    case, flips = puzzle("linf", targeted=targeted), 0
    for row in range(6):
        beside = reference(case.x[row].double(), (0.0, 1.0), 1e-3)
        point, before = next(beside), None
        for state, fooled in states(RayS(steps=400, tolerance=1e-3), case, row):
            if not state.done:
                torch.testing.assert_close(state.x[0].double(), point, atol=1e-6, rtol=0)
                point = beside.send(fooled)
                flips += before is not None and not torch.equal(before, state.signs)
                before = state.signs
        assert int(state.level) >= 5  # single features are reached
    assert flips > 20


@pytest.mark.parametrize(("rows", "targeted"), [(1, True), (3, False), (8, True)])
@pytest.mark.parametrize("shape", [(1, 2, 3), (3, 4, 4), (1, 7, 7)])
def test_it_finds_the_closed_form(shape, rows, targeted):
    """On a hyperplane a flip helps if the sign was wrong, so one look at every feature is enough."""
    case = linear("linf", shape, rows)
    targets = torch.ones(rows, 1, dtype=torch.int64) if targeted else None
    got = run(case.model, RayS(steps=1000, tolerance=1e-5), case.limit, case.x, case.y, targets=targets)
    assert got.found.all()
    assert float(got.distance.min()) >= 0.5 * (1 - 1e-5)
    assert float(got.distance.max()) <= 0.5 * 1.002  # 1e-5 of a range of 40, and every look may be off by as much
    assert got.forward.tolist() == [1001] * rows


def test_a_look_that_fails_costs_one_query(states):
    """Only one direction fools, and only at the edge: it is the first in which a single feature is flipped."""

    def logits(flat):
        only = ((flat[:, 0] < 0.05) & (flat[:, 1:] > 0.9).all(1)).double()
        return torch.stack([0 * only + 0.5, only], 1)

    x, zero = torch.full((1, 1, 1, 8), 0.5), torch.zeros(1, dtype=torch.int64)
    case = Puzzle(Probe(logits), threat("linf", 0.6), x, zero, None)
    asked = [(state.x.flatten() > 0.5).tolist() for state, _ in states(RayS(steps=8), case, 0)]
    up, down = [True] * 8, [False] * 8
    assert asked[:4] == [up, down, down[:4] + up[4:], up[:4] + down[4:]]
    assert asked[8] == [False, *up[1:]]
    assert run(case.model, RayS(steps=8), case.limit, x, zero).found.all()
    assert not run(case.model, RayS(steps=7), case.limit, x, zero).found.any()


def test_the_budget_is_met():
    case = linear("linf", (3, 4, 4), 8)
    limit = threat("linf", 0.51, case.model.bounds)
    got = run(case.model, RayS(steps=1000), limit, case.x, case.y)
    assert got.found.all()
    assert float(got.distance.max()) <= 0.51 + 1e-6
    assert not run(case.model, RayS(steps=400), threat("linf", 0.499, case.model.bounds), case.x, case.y).found.any()
