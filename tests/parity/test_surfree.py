"""SurFree: point for point beside a plain reference, its directions, and the closed form on linear models."""

from __future__ import annotations

import math

import pytest
import torch

from sparring.attacks.surfree import SurFree, smooth
from sparring.core import noise
from sparring.core.threat import threat
from sparring.engine.loop import run
from sparring.testing import linear, puzzle


def reference(x0, key, bounds, angle, rho, signs):
    """Algorithm 1 in float64, one row: is sent the first image that fools, then yields where to ask."""
    low, high = bounds
    far, count = yield
    no, yes = 0.0, 1.0
    for _ in range(10):
        share = (no + yes) / 2
        count += 1
        no, yes = (no, share) if (yield x0 + share * (far - x0)) else (share, yes)
    base, first = x0 + yes * (far - x0), math.radians(angle)
    while True:
        first = min(first, 0.75)
        distance = float((base - x0).norm())
        u = (base - x0) / distance
        v = noise.normal(key, x0.shape, count + 1)[0].double()
        v -= (v * u).sum() * u
        v /= v.norm()

        def at(theta, u=u, v=v, distance=distance):
            return (x0 + distance * math.cos(theta) * (math.cos(theta) * u + math.sin(theta) * v)).clamp(low, high)

        for j in range(2 * signs):
            theta = first * (1 - (j // 2) / signs) * (-1) ** j
            count += 1
            if (yield at(theta)):
                break
        else:
            first *= rho
            continue
        more = math.copysign(first / signs, theta)
        beyond = theta + more
        while j < 2 and abs(beyond) < 1.5:
            count += 1
            if not (yield at(beyond)):
                break
            theta, beyond = beyond, beyond + more
        beyond, turns = max(-1.5, min(1.5, beyond)), 0
        while abs(math.cos(theta) - math.cos(beyond)) > 0.01 and turns < 10:
            middle, turns = (theta + beyond) / 2, turns + 1
            count += 1
            theta, beyond = (middle, beyond) if (yield at(middle)) else (theta, middle)
        base, first = at(theta), first / rho


@pytest.mark.parametrize("signs", [1, 3])
@pytest.mark.parametrize("targeted", [False, True])
def test_every_point_is_that_of_the_reference(targeted, signs, states):
    case, turns = puzzle("l2", targeted=targeted), 0
    for row in range(6):
        beside = reference(case.x[row].double(), torch.tensor([77 + row]), (0.0, 1.0), 40.0, 0.9, signs)
        next(beside)
        point, before = None, None
        for state, fooled in states(SurFree(steps=300, angle=40.0, rho=0.9, signs=signs), case, row):
            if state.done:
                break
            if point is not None:
                torch.testing.assert_close(state.x[0].double(), point, atol=2e-5, rtol=0)
                point = beside.send(fooled)
                turns += not torch.equal(before, state.base)
            elif fooled:
                point = beside.send((state.x[0].double(), int(state.k)))
            before = state.base
    assert turns > 50


@pytest.mark.parametrize(("rows", "targeted"), [(1, True), (3, False), (8, True)])
@pytest.mark.parametrize("shape", [(1, 2, 3), (3, 4, 4), (1, 7, 7)])
def test_it_finds_the_closed_form(shape, rows, targeted):
    case = linear("l2", shape, rows)
    targets = torch.ones(rows, 1, dtype=torch.int64) if targeted else None
    got = run(case.model, SurFree(steps=1500), case.limit, case.x, case.y, targets=targets)
    assert got.found.all()
    assert float(got.distance.min()) >= 0.5 * (1 - 1e-5)
    assert float(got.distance.max()) <= 0.5 * 1.01
    assert got.forward.tolist() == [1501] * rows


def test_points_only_come_nearer(states):
    case = puzzle("l2")
    for row in range(4):
        nearest = math.inf
        for state, _ in states(SurFree(steps=400), case, row):
            if state.phase >= 2:
                distance = float((state.base.double() - case.x[row]).norm())
                assert distance <= nearest * (1 + 1e-6)
                nearest = distance
        assert nearest < 0.6


def test_directions_are_smooth_if_asked_for():
    """What is left is the projection onto the lowest cosines: a second time changes nothing, and constants stay."""
    way = noise.normal(torch.arange(3), (2, 8, 6))
    low = smooth(way, 0.5)
    torch.testing.assert_close(smooth(low, 0.5), low, atol=1e-6, rtol=0)
    torch.testing.assert_close(low.mean((2, 3)), way.mean((2, 3)), atol=1e-6, rtol=0)
    assert torch.linalg.matrix_rank(low[0, 0].double(), rtol=1e-5) == 3
    torch.testing.assert_close(smooth(way, 1.0), way, atol=1e-6, rtol=0)
    share = low.square().sum() / way.square().sum()
    assert 0.1 < float(share) < 0.4  # 12 of 48 cosines
    case = puzzle("l2")
    got = run(case.model, SurFree(steps=300, share=0.5), case.limit, case.x, case.y)
    assert got.found.sum() >= 3


def test_starts_are_sought_so_often_and_no_more():
    case = puzzle("l2")
    deaf = type(case.model)(lambda flat: 3 * torch.eye(4, dtype=torch.float64)[:1] + 0 * flat[:, :4])
    got = run(deaf, SurFree(tries=17), case.limit, case.x, torch.zeros_like(case.y))
    assert not got.found.any()
    assert got.forward.tolist() == [18] * 12


def test_the_budget_is_met():
    case = linear("l2", (3, 4, 4), 8)
    got = run(case.model, SurFree(steps=1500), threat("l2", 0.51, case.model.bounds), case.x, case.y)
    assert got.found.all()
    assert float(got.distance.max()) <= 0.51 + 1e-6
    limit = threat("l2", 0.499, case.model.bounds)
    assert not run(case.model, SurFree(steps=500), limit, case.x, case.y).found.any()
