"""HopSkipJump: point for point beside a plain reference, on linear models, and query by query."""

from __future__ import annotations

import math

import pytest
import torch

from sparring.attacks.hopskipjump import HopSkipJump
from sparring.core import noise
from sparring.core.batch import Batch
from sparring.core.model import Access
from sparring.core.threat import threat
from sparring.engine.loop import run
from sparring.testing import linear, puzzle

NORMS = ["l2", "linf"]


def reference(x0, key, norm, bounds, initial):
    """Algorithm 2 in float64, one row: yields where to ask, is sent whether it fooled."""
    shape, d, count = x0.shape, x0.numel(), 0
    low, high = bounds

    def length(delta):
        return float(delta.abs().max() if norm == "linf" else delta.norm())

    def mix(far, share):
        if norm == "linf":
            reach = share * length(far - x0)
            return torch.minimum(torch.maximum(far, x0 - reach), x0 + reach)
        return (1 - share) * x0 + share * far

    while True:
        side = 2 ** (count % (min(shape[1:]).bit_length() - 1))
        pixels = noise.uniform(key, shape, count)[0].double()
        x = torch.zeros_like(x0)
        for i in range(shape[1]):
            for j in range(shape[2]):
                x[:, i, j] = low + (high - low) * pixels[:, i // side, j // side]
        count += 1
        if (yield x):
            break
    t = 0
    while True:
        t, far, no, yes = t + 1, x, 0.0, 1.0
        while yes - no > (d**-2 if norm == "linf" else d**-1.5):
            middle = (no + yes) / 2
            count += 1
            no, yes = (no, middle) if (yield mix(far, middle)) else (middle, yes)
        base = mix(far, yes)
        delta = 0.1 * (high - low) if t == 1 else length(far - x0) / d
        probes, answers = [], []
        for _ in range(int(initial * math.sqrt(t))):
            u = noise.normal(key, shape, torch.tensor([count - 1]))[0].double()
            x = (base + delta * u / u.norm()).clamp(low, high)
            count += 1
            answers.append(1.0 if (yield x) else -1.0)
            probes.append((x - base) / delta)
        mean = sum(answers) / len(answers)
        v = torch.zeros_like(x0)
        for answer, probe in zip(answers, probes, strict=True):
            v += (answer if abs(mean) == 1 else answer - mean) * probe
        v = v.sign() if norm == "linf" else v / v.norm()
        size = length(base - x0) / math.sqrt(t)
        while True:
            x = (base + size * v).clamp(low, high)
            count += 1
            if (yield x):
                break
            size /= 2


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_every_point_is_that_of_the_reference(norm, targeted, states):
    case, leaps = puzzle(norm, targeted=targeted), 0
    for row in range(4):
        attack = HopSkipJump(steps=500, initial=20)
        beside = reference(case.x[row].double(), torch.tensor([77 + row]), norm, (0.0, 1.0), 20)
        point = next(beside)
        for state, fooled in states(attack, case, row):
            if not state.done:
                torch.testing.assert_close(state.x[0].double(), point, atol=2e-5, rtol=0)
                point = beside.send(fooled)
                leaps = max(leaps, int(state.t))
    assert leaps >= 5


@pytest.mark.parametrize(("rows", "targeted"), [(1, True), (3, False), (8, True)])
@pytest.mark.parametrize("shape", [(1, 2, 3), (3, 4, 4), (1, 7, 7)])
@pytest.mark.parametrize(("norm", "within"), [("l2", 1.05), ("linf", 1.15)])
def test_it_comes_near_the_closed_form(norm, within, shape, rows, targeted):
    case = linear(norm, shape, rows)
    targets = torch.ones(rows, 1, dtype=torch.int64) if targeted else None
    got = run(case.model, HopSkipJump(steps=2000), case.limit, case.x, case.y, targets=targets)
    assert got.found.all()
    assert float(got.distance.min()) >= 0.5 * (1 - 1e-5)
    assert float(got.distance.max()) <= 0.5 * within
    assert got.forward.tolist() == [2001] * rows


@pytest.mark.parametrize("norm", NORMS)
def test_the_estimate_points_where_the_boundary_faces(norm, states):
    """With B probes in d dimensions the cosine is about sqrt(b / (1 + b)) for b = 2 B / (pi d)."""
    case = linear(norm, (1, 4, 5), 6)
    weight = case.model.query(torch.eye(20).view(20, 1, 4, 5), Access.SCORE).logits.double()
    weight = weight[:, 1] - weight[:, 0]
    cosines = {}
    for row in range(6):
        before = None
        for state, _ in states(HopSkipJump(steps=1500, initial=100), case, row):
            if before is not None and state.phase == 3 and before.phase == 2:
                way = before.toward - before.hits / before.count * before.drift  # all but the last probe
                cosine = float((way.flatten().double() * weight).sum() / way.double().norm() / weight.norm())
                cosines.setdefault(int(state.t), []).append(cosine)
            before = state
    assert len(cosines) >= 5
    for t in range(2, 6):  # the first boundary point is far off and its probes are long
        b = 2 * 100 * math.sqrt(t) / (math.pi * 20)
        assert abs(sum(cosines[t]) / len(cosines[t]) - math.sqrt(b / (1 + b))) < 0.05
        assert min(cosines[t]) > 0.75


def test_rounds_take_more_and_more_probes(states):
    case, spent = linear("l2", (1, 4, 5), 1), {}
    for state, _ in states(HopSkipJump(steps=2000, initial=100), case, 0):
        if state.phase == 2:
            spent[int(state.t)] = spent.get(int(state.t), 0) + 1
    assert [spent[t] for t in range(1, 8)] == [100, 141, 173, 200, 223, 244, 264]


@pytest.mark.parametrize(
    ("norm", "shape", "wanted"),
    [
        ("linf", (1, 4, 5), 30),
        ("linf", (1, 10, 10), 30),
        ("linf", (1, 20, 20), 60),
        ("linf", (3, 30, 30), 100),
        ("l2", (1, 20, 20), 30),
    ],
)
def test_rounds_grow_with_the_image_in_linf(norm, shape, wanted, states):
    """clamp(3 sqrt(d), 30, 100) probes in the first round, and 30 in L2."""
    case = linear(norm, shape, 1)
    spent = [int(state.t) for state, _ in states(HopSkipJump(steps=wanted + 150), case, 0) if state.phase == 2]
    assert spent.count(1) == wanted


def test_starts_are_sought_so_often_and_no_more():
    case = puzzle("l2")
    got = run(case.model, HopSkipJump(tries=17), case.limit, case.x, case.y)
    assert got.forward.max() > 17
    deaf = type(case.model)(lambda flat: 3 * torch.eye(4, dtype=torch.float64)[:1] + 0 * flat[:, :4])
    got = run(deaf, HopSkipJump(tries=17), case.limit, case.x, torch.zeros_like(case.y))
    assert not got.found.any()
    assert got.forward.tolist() == [18] * 12  # and once more, legally


def test_it_begins_at_the_point_that_is_given():
    case = puzzle("l2")
    start = case.limit.project(case.x + 0.03, case.x)
    batch = Batch(case.x, case.y, torch.full_like(case.y, -1), case.y, case.limit, start)
    assert torch.equal(HopSkipJump().init(batch).x, start)


@pytest.mark.parametrize("norm", NORMS)
def test_the_budget_is_met(norm):
    case = linear(norm, (3, 4, 4), 8)
    limit = threat(norm, 0.55, case.model.bounds)
    got = run(case.model, HopSkipJump(steps=3000), limit, case.x, case.y)
    assert got.found.all()
    assert float(got.distance.max()) <= 0.55 + 1e-6
    limit = threat(norm, 0.495, case.model.bounds)
    got = run(case.model, HopSkipJump(steps=500), limit, case.x, case.y)
    assert not got.found.any()
    assert float(got.distance.max()) <= 0.495 + 1e-6  # the last point is legal, though the search is not held to it
