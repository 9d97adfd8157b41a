"""Closer and Shrink, point by point, beside plain loops over one row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sparring.attacks.fab import FAB
from sparring.attacks.sprint import blocks
from sparring.auditing.closer import Closer, Onward, Shrink
from sparring.core.attack import Observation
from sparring.core.batch import Batch
from sparring.core.judge import Judge
from sparring.core.model import Access
from sparring.core.threat import threat
from sparring.testing import Probe, Puzzle, linear, puzzle

NORMS = ("linf", "l2", "l1")
FAR = 50.0
FIRST = {"linf": 0.02, "l2": 0.06, "l1": 0.15}


def batch_of(case: Puzzle, row: int, begin: Tensor | None = None) -> Batch:
    one = slice(row, row + 1)
    return Batch(case.x[one], case.y[one], torch.tensor([-1]), torch.tensor([70 + row]), case.limit, begin)


def asked(attack: Any, model: Probe, batch: Batch) -> Iterator[tuple[Tensor, bool]]:
    """All that is asked about to the last point, and whether the judge lets it count."""
    state = attack.init(batch)
    while True:
        said = model.query(state.x, Access.GRADIENT)
        hit = Judge().adversarial(batch, state.x, said)
        yield state.x, bool(hit)
        if state.done:
            return
        state = attack.step(batch, state, Observation(batch, said, hit, attack.needs))


def size_of(norm: str, change: Tensor) -> float:
    flat = change.double().flatten().abs()
    return float({"linf": flat.max(), "l1": flat.sum()}.get(norm, flat.square().sum().sqrt()))


def slope(model: Probe, x: Tensor, y: int) -> Tensor:
    """Of log((1 - p_y) / p_y)."""
    leaf = x.flatten(1).double().requires_grad_()
    p = model.net(leaf).softmax(1)[0]
    (gradient,) = torch.autograd.grad(((1 - p[y]) / p[y]).log(), leaf)
    return gradient.float().view_as(x)


def sprints(case: Puzzle, batch: Batch, steps: int, first: float, wide: float) -> tuple[list[Tensor], set[str]]:
    """The points of a search as the class says that it goes, with its usual laps, shares and momentum."""
    norm, x0, y, count = case.limit.norm, batch.x, int(batch.y), 0

    def drawn(point: Tensor, radius: float) -> Tensor:
        return threat(norm, radius, case.model.bounds).project(point, x0)

    begun = size_of(norm, batch.begin - x0)
    nearest, least = (batch.begin, begun) if begun else (x0, math.inf)
    share, points, met = 0.1, [], set()
    radius = least * 0.9 if begun else first
    while True:
        warm, times = least < math.inf and count % 2 == 0, 1.0
        if not warm and count // 2 % 2 == 0:
            times = wide
        laps = 8 if warm else 16
        x = drawn(nearest, radius) if warm else drawn(
            x0 + radius * times * blocks(batch.key + count * 25214903917, x0.shape[1:], 4), radius * times
        )  # fmt: skip
        before, fooled = x, False
        for lap in range(laps):
            points.append(x)
            if len(points) > steps:
                return points, met
            wrong = int(case.model.query(x, Access.DECISION).labels) != y
            length = size_of(norm, x - x0)
            if wrong and length < least:
                fooled = True
                break
            grown = 1 + (times - 1) * max(0.0, 1 - (lap + 1) / (0.6 * laps))
            step = radius * grown * (0.3 if warm else 2.0) * (1 - lap / laps)
            onward = x + step * case.limit.steepest(slope(case.model, x, y), x)
            if lap:
                onward = x + 0.75 * (onward - x) + 0.25 * (x - before)
            x, before = drawn(onward, radius * grown), x
        met.add(f"{'warm' if warm else 'wide' if times > 1 else 'far'} {'won' if fooled else 'lost'}")
        count += 1
        if least < math.inf:
            share = min(max(share * 1.5 if fooled else share / 2, 0.001), 0.2)
            met.add({0.001: "least", 0.2: "largest"}.get(share, ""))
        if fooled:
            nearest, least = x, length
        radius = least * (1 - share) if least < math.inf else 2 * radius


@pytest.mark.parametrize("wide", [1.0, 3.0])
@pytest.mark.parametrize("norm", NORMS)
def test_every_point_of_closer_is_that_of_a_plain_loop(norm, wide):
    """From nothing, and from a point far off that fools; the two part only where a tiny gradient changes its sign."""
    case, met, parted = puzzle(norm), set(), 0
    case = Puzzle(case.model, threat(norm, FAR), case.x, case.y, None)
    attack = Closer(150, first=FIRST[norm], wide=wide)
    for row in range(4):
        begin = None
        if row % 2:
            away = next(other for other in range(len(case.x)) if case.y[other] != case.y[row])
            begin = case.x[away : away + 1]
        batch = batch_of(case, row, begin)
        wanted, paths = sprints(case, batch, 150, FIRST[norm], wide)
        got = [point for point, _ in asked(attack, case.model, batch)]
        assert len(got) == len(wanted) == 151
        beside = [bool((a - b).abs().max() < 1e-4) for a, b in zip(got, wanted, strict=True)]
        assert all(beside[:40])
        parted += not all(beside)
        met |= paths
    assert parted <= 1
    assert met >= {"warm won", "warm lost", "far lost", "largest", "wide won" if wide > 1 else "least"}


@pytest.mark.parametrize("part", [0.1, 0.37, 0.9])
def test_shrink_asks_where_bisection_does(part):
    """The boundary of a linear model lies this part of the way to where it begins."""
    case = linear("l2", (1, 4, 5), 3)
    weight = case.model.net(torch.eye(20).double())[:, 0].view(1, 1, 4, 5)
    begin = case.x - (case.x.double() - nearest(case.x, weight)).float() / part
    for row in range(3):
        batch = batch_of(case, row, begin[row : row + 1])
        low, high, found = 0.0, 1.0, []
        for x, hit in asked(Shrink(), case.model, batch):
            middle = (low + high) / 2
            torch.testing.assert_close(x, batch.x + middle * (batch.begin - batch.x), rtol=0, atol=1e-6)
            assert hit == (middle > part)
            low, high = (low, middle) if hit else (middle, high)
            found.append(middle)
        assert len(found) == 12


def nearest(x: Tensor, weight: Tensor) -> Tensor:
    """The points (n, c, h, w) of the plane weight . x = 0 next to `x`."""
    along = (x.double() * weight).flatten(1).sum(1) / weight.square().sum()
    return x.double() - along.view(-1, 1, 1, 1) * weight


def test_onward_is_fab_that_goes_on():
    case, fab = linear("l2", (1, 4, 5), 3), FAB(12)
    batch = batch_of(case, 0)
    for (one, _), (two, _) in zip(asked(fab, case.model, batch), asked(Onward(fab), case.model, batch), strict=True):
        assert torch.equal(one, two)
    assert Onward(fab).minimizes
