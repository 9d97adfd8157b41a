"""The Boundary attack: point for point beside a plain reference, its steps' adaptation, and linear models."""

from __future__ import annotations

import pytest
import torch

from sparring.attacks.boundary import Boundary
from sparring.core import noise
from sparring.core.threat import threat
from sparring.engine.loop import run
from sparring.testing import linear, puzzle


def reference(x0, key, bounds, aside, inward, check):
    """The walk in float64, one row: is sent the first image that fools, then yields where to ask."""
    low, high = bounds
    far, count = yield
    share, no, yes = 0.5, 0.0, 1.0
    for _ in range(10):
        share = (no + yes) / 2
        count += 1
        no, yes = (no, share) if (yield x0 + share * (far - x0)) else (share, yes)
    best = x0 + yes * (far - x0)

    def step(count, inward):
        unit = (best - x0) / (best - x0).norm()
        eta = noise.normal(key, x0.shape, count)[0].double()
        eta -= (eta * unit).sum() * unit
        eta *= aside * (best - x0).norm() / eta.norm()
        on_sphere = x0 + (best + eta - x0) * (best - x0).norm() / (best + eta - x0).norm()
        return (on_sphere + inward * (x0 - on_sphere)).clamp(low, high)

    while True:
        count += 1
        aside = min(0.5, aside * (1.5 if (yield step(count, 0.0)) else 1 / 1.5))
        for _ in range(check - 1):
            count += 1
            x = step(count, inward)
            fooled = yield x
            best = x if fooled else best
            inward = min(0.5, inward * (1.15**3 if fooled else 1 / 1.15))


@pytest.mark.parametrize("targeted", [False, True])
def test_every_point_is_that_of_the_reference(targeted, states):
    case, kept = puzzle("l2", targeted=targeted), 0
    for row in range(6):
        beside = reference(case.x[row].double(), torch.tensor([77 + row]), (0.0, 1.0), 0.2, 0.05, 7)
        next(beside)
        point = None
        for state, fooled in states(Boundary(steps=300, aside=0.2, inward=0.05, check=7), case, row):
            if state.done:
                break
            if point is not None:
                torch.testing.assert_close(state.x[0].double(), point, atol=2e-5, rtol=0)
                point = beside.send(fooled)
                kept += fooled
            elif fooled:
                point = beside.send((state.x[0].double(), int(state.k)))
    assert kept > 300


@pytest.mark.parametrize(("rows", "targeted"), [(1, True), (3, False), (8, True)])
@pytest.mark.parametrize("shape", [(1, 2, 3), (3, 4, 4), (1, 7, 7)])
def test_it_comes_near_the_closed_form(shape, rows, targeted):
    case = linear("l2", shape, rows)
    targets = torch.ones(rows, 1, dtype=torch.int64) if targeted else None
    got = run(case.model, Boundary(steps=3000), case.limit, case.x, case.y, targets=targets)
    assert got.found.all()
    assert float(got.distance.min()) >= 0.5 * (1 - 1e-5)
    assert float(got.distance.max()) <= 0.5 * 1.05
    assert got.forward.tolist() == [3001] * rows


def test_about_half_of_the_checks_and_a_quarter_of_the_steps_fool(states):
    case, checks, steps = linear("l2", (1, 7, 7), 1), [], []
    for state, fooled in states(Boundary(steps=3000), case, 0):
        if int(state.k) > 300:
            (checks if state.phase == 2 else steps).append(fooled)
    assert len(checks) == pytest.approx(len(steps) / 9, abs=2)
    assert 0.4 < sum(checks) / len(checks) < 0.6
    assert 0.2 < sum(steps) / len(steps) < 0.3


def test_starts_are_sought_so_often_and_no_more():
    case = puzzle("l2")
    deaf = type(case.model)(lambda flat: 3 * torch.eye(4, dtype=torch.float64)[:1] + 0 * flat[:, :4])
    got = run(deaf, Boundary(tries=17), case.limit, case.x, torch.zeros_like(case.y))
    assert not got.found.any()
    assert got.forward.tolist() == [18] * 12


def test_the_budget_is_met():
    case = linear("l2", (3, 4, 4), 8)
    got = run(case.model, Boundary(steps=3000), threat("l2", 0.55, case.model.bounds), case.x, case.y)
    assert got.found.all()
    assert float(got.distance.max()) <= 0.55 + 1e-6
    limit = threat("l2", 0.495, case.model.bounds)
    assert not run(case.model, Boundary(steps=500), limit, case.x, case.y).found.any()
