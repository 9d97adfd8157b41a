"""Brendel and Bethge's step against scipy, their walk against a plain loop, and both against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import linprog, minimize
from torch import Tensor

from sparring.attacks.boundary_step import boundary_step
from sparring.attacks.brendel_bethge import BrendelBethge
from sparring.core import noise
from sparring.core.batch import Batch
from sparring.core.model import Access
from sparring.core.threat import L2, Unbounded, threat
from sparring.engine.loop import run
from sparring.testing import DUALS, Probe, linear

Array = NDArray[np.float64]
SHAPES = [(1, 2, 3), (3, 4, 4), (1, 7, 7)]
NORMS = ["l2", "linf", "l1"]
SIZE, CLASSES = 20, 5


def problem(index: int, kind: str) -> tuple[Array, Array, Array, float, float]:
    """A point, an image, a unit vector, a rise and a radius."""
    draw = np.random.default_rng([index, len(kind)])
    d = int(draw.integers(2, 11))
    x, origin, slope = draw.random(d), draw.random(d), draw.normal(size=d)
    if kind != "inside":  # pixels exactly on their bounds, of the point and of the image
        x, origin = (np.clip(1.6 * each - 0.3, 0, 1) for each in (x, origin))
    if kind == "idle":
        slope[draw.random(d) < 0.3] = 0.0
        slope[0] = 1.0
    elif kind == "equal":
        slope = np.sign(slope)
    elif kind == "steep":
        slope *= 10.0 ** draw.uniform(-4, 0, d)
    radius = 10.0 ** draw.uniform(-1.5, 0.3)
    return x, origin, slope / np.linalg.norm(slope), float(draw.uniform(-1.1, 1.1)) * radius, radius


def ours(norm: str, x: Array, origin: Array, slope: Array, rise: float, radius: float) -> Array:
    rows = [torch.tensor(np.atleast_2d(each), dtype=torch.float64) for each in (x, origin, slope, rise, radius)]
    return np.asarray(boundary_step(norm, *rows, (0.0, 1.0))[0])


def length(norm: str, delta: Array) -> float:
    return float(np.linalg.norm(delta, {"l2": 2, "linf": np.inf, "l1": 1}[norm]))


def infeasible(x: Array, slope: Array, rise: float, radius: float, step: Array) -> float:
    """By how much the step breaks the worst of its four constraints."""
    beyond = float(max((-x - step).max(), (x + step - 1).max()))
    return max(abs(float(slope @ step) - rise), float(np.linalg.norm(step)) - radius, beyond)


def by_scipy(norm: str, x: Array, origin: Array, slope: Array, rise: float, radius: float, start: Array) -> float:
    """The least distance, by sequential quadratic programming; in Linf and L1 with slack variables."""
    d, home = len(x), origin - x
    extra = {"l2": 0, "linf": 1, "l1": d}[norm]
    pad = np.zeros(extra)
    limits = [
        {"type": "eq", "fun": lambda z: slope @ z[:d] - rise, "jac": lambda z: np.r_[slope, pad]},
        {"type": "ineq", "fun": lambda z: radius**2 - z[:d] @ z[:d], "jac": lambda z: np.r_[-2 * z[:d], pad]},
    ]
    cover = np.eye(d) if norm == "l1" else np.ones((d, extra))
    above = np.block([[np.eye(d), cover], [-np.eye(d), cover]])  # slack >= |step - home|
    if norm != "l2":
        limits.append({"type": "ineq", "fun": lambda z: above @ z - np.r_[home, -home], "jac": lambda z: above})
    best = np.inf
    for first in (start, np.zeros(d)):
        slack = np.abs(first - home)
        z = np.r_[first, {"l2": pad, "linf": slack.max(keepdims=True), "l1": slack}[norm]]
        goal = (lambda z: 0.5 * ((z - home) ** 2).sum()) if norm == "l2" else (lambda z: z[d:].sum())
        slant = (lambda z: z - home) if norm == "l2" else (lambda z: np.r_[np.zeros(d), pad + 1])
        bounds = [*zip(-x, 1 - x, strict=True), *[(0, None)] * extra]
        more = {"bounds": bounds, "constraints": limits, "options": {"maxiter": 300, "ftol": 1e-14}}
        found = minimize(goal, z, jac=slant, method="SLSQP", **more).x[:d]
        if infeasible(x, slope, rise, radius, found) < 1e-7:
            best = min(best, length(norm, found - home))
    return best


def furthest(x: Array, slope: Array, radius: float) -> float:
    """The most that a step in ball and box gains, by bisection over t in clip(t slope)."""
    low, high = 0.0, 1e9
    for _ in range(200):
        t = (low + high) / 2
        fits = np.linalg.norm(np.clip(t * slope, -x, 1 - x)) <= radius
        low, high = (t, high) if fits else (low, t)
    return float(slope @ np.clip(low * slope, -x, 1 - x))


@pytest.mark.parametrize("kind", ["inside", "bounds", "idle", "equal", "steep"])
@pytest.mark.parametrize("norm", NORMS)
def test_the_step_is_that_of_scipy(norm, kind):
    both = short = 0
    for index in range(24):
        x, origin, slope, rise, radius = case = problem(index, kind)
        step = ours(norm, *case)
        gain = furthest(x, np.sign(rise) * slope, radius)
        if gain <= abs(rise):
            short += 1
            assert infeasible(x, slope, np.sign(rise) * gain, radius, step) < 1e-9  # as near to the plane as can be
            continue
        assert infeasible(x, slope, rise, radius, step) < 1e-9
        assert length(norm, x + step - origin) == pytest.approx(by_scipy(norm, *case, step), abs=2e-7), index
        at_bound = np.minimum(x + step, 1 - x - step).min() < 1e-12
        both += at_bound and np.linalg.norm(step) > radius * (1 - 1e-9)
    assert short >= 5
    assert both >= 3 or kind == "inside"  # box and trust region both bind


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_in_a_wide_trust_region_the_step_solves_a_linear_program(norm):
    for index in range(40):
        x, origin, slope, rise, _ = problem(index, "bounds")
        d, step = len(x), ours(norm, x, origin, slope, rise, 9.0)
        extra = d if norm == "l1" else 1
        cover = np.eye(d) if norm == "l1" else np.ones((d, 1))
        home, goal = origin - x, np.r_[np.zeros(d), np.ones(extra)]
        below = np.block([[np.eye(d), -cover], [-np.eye(d), -cover]])
        bounds = [*zip(-x, 1 - x, strict=True), *[(0, None)] * extra]
        wanted = linprog(goal, below, np.r_[home, -home], np.r_[slope, np.zeros(extra)][None], [rise], bounds)
        if wanted.success:
            assert infeasible(x, slope, rise, 9.0, step) < 1e-9
            assert length(norm, step - home) == pytest.approx(wanted.fun, abs=1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_a_row_of_many_pixels_gets_the_same_step_alone_and_in_other_units(norm):
    """The slopes span twelve orders of magnitude and half of the pixels are on a bound: rows settle in turn."""
    key = torch.arange(12)
    origin = (1.5 * noise.uniform(key, (300,), 1).double() - 0.75).clamp(0, 1)
    x = (origin + 0.2 * noise.normal(key, (300,), 2)).clamp(0, 1)
    slope = noise.normal(key, (300,), 3).double() * 10.0 ** (-12 * noise.uniform(key, (300,), 4).double())
    slope = slope / slope.norm(dim=1, keepdim=True)
    radius = 10.0 ** (-4 * noise.uniform(key, (1,), 5).double())
    rise = 0.5 * radius * noise.uniform(key, (1,), 6)
    step = boundary_step(norm, x, origin, slope, rise, radius, (0.0, 1.0))
    for row in range(12):
        one = slice(row, row + 1)
        each = (x[one], origin[one], slope[one], rise[one], radius[one])
        assert torch.equal(boundary_step(norm, *each, (0.0, 1.0)), step[one])
    wide = boundary_step(norm, 256 * x, 256 * origin, slope, 256 * rise, 256 * radius, (0.0, 256.0))
    assert torch.equal(wide, 256 * step)
    reached = (slope * step).sum(1, keepdim=True)
    torch.testing.assert_close(reached[reached > 0.99 * rise], rise[reached > 0.99 * rise], rtol=0, atol=1e-9)
    assert (reached > 0.99 * rise).sum() >= 8


def curved(rows: int) -> tuple[Probe, Tensor, Tensor]:
    """A smooth network of five classes, images, and its own labels."""
    hidden = noise.normal(torch.tensor([1]), (SIZE, 16)).squeeze(0).double()
    out = noise.normal(torch.tensor([2]), (16, CLASSES)).squeeze(0).double()
    model = Probe(lambda flat: (2.0 * (flat - 0.5) @ hidden).tanh() @ out)
    x = noise.uniform(torch.arange(rows), (1, 4, 5))
    return model, x, model.query(x, Access.DECISION).labels


def reference(model: Probe, norm: str, batch: Batch, row: int, attack: BrendelBethge) -> Tensor:
    """One row (d,) in float64: all points that are asked about."""
    x0, y, target = batch.x[row].flatten().double(), int(batch.y[row]), int(batch.target[row])
    asked: list[Tensor] = []

    def ask(x: Tensor) -> tuple[bool, float, Tensor]:
        asked.append(x)
        point = x.clone().requires_grad_()
        z = model.net(point[None])[0]
        aim, sign = (target, 1.0) if target >= 0 else (y, -1.0)
        value = sign * (z[aim] - torch.cat([z[:aim], z[aim + 1 :]]).max())
        (slope,) = torch.autograd.grad(value, point)
        return float(value.detach()) > 0, float(value.detach()), slope

    x = x0
    while not (answer := ask(x))[0]:
        way = answer[2].masked_fill(((answer[2] > 0) & (x >= 1)) | ((answer[2] < 0) & (x <= 0)), 0.0)
        x = (x + attack.pace * SIZE**0.5 * way / way.norm()).clamp(0, 1)
        assert len(asked) < attack.climbs
    far, low, high = x, 0.0, 1.0

    def between(share: float) -> Tensor:
        if norm == "linf":
            reach = share * float((far - x0).abs().max())
            return far.clamp(x0 - reach, x0 + reach)
        return x0 + share * (far - x0)

    for _ in range(attack.halvings):
        middle = (low + high) / 2
        low, high = (low, middle) if ask(between(middle))[0] else (middle, high)
    x, begun, mean = between(high), len(asked), None
    reach = float((x - x0).norm())
    while len(asked) < attack.steps:
        walked = (len(asked) - begun) / (attack.steps - begun)
        fooled, value, slope = ask(x)
        mean = slope if mean is None else attack.momentum * mean + (1 - attack.momentum) * slope
        aim = -(1 - attack.overshoot if fooled else 1 + attack.overshoot) * value / float(mean.norm())
        radius = attack.radius * (10.0 if norm == "linf" else 1.0) * reach * 0.5 ** int(attack.cuts * walked)
        step = ours(norm, x.numpy(), x0.numpy(), (mean / mean.norm()).numpy(), aim, radius)
        x = (x + torch.tensor(step)).clamp(0, 1)
    return torch.stack([*asked, x])


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_every_point_is_that_of_a_plain_loop(norm, targeted, points):
    rows, attack = 4, BrendelBethge(steps=40)
    model, x, y = curved(rows)
    target = (y + 1) % CLASSES if targeted else torch.full_like(y, -1)
    limit = threat(norm, float("inf"))
    batch = Batch(x, y, target, torch.arange(rows), limit)
    found = points(attack, model, batch).flatten(2).double()
    assert len(found) == attack.steps + 1
    for row in range(rows):
        wanted = reference(model, norm, batch, row, attack)
        torch.testing.assert_close(found[:30, row], wanted[:30], rtol=0, atol=1e-4)
        torch.testing.assert_close(found[:, row], wanted, rtol=0, atol=2e-3)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", NORMS)
def test_comes_within_two_percent_of_the_closed_form(norm, shape, rows, targeted):
    case = linear(norm, shape, rows)
    targets = torch.ones(rows, 1, dtype=torch.int64) if targeted else None
    got = run(case.model, BrendelBethge(steps=50), case.limit, case.x, case.y, targets=targets)
    assert got.found.all()
    assert float(got.distance.min()) >= 0.5 * (1 - 1e-5)
    assert float(got.distance.max()) <= 0.5 * 1.001
    assert got.forward.tolist() == [51] * rows
    assert got.backward.tolist() == [50] * rows


@pytest.mark.parametrize("norm", NORMS)
def test_where_the_box_is_in_the_way(norm):
    """Images near a corner of the box that the plane cuts off."""
    slope = np.asarray(noise.normal(torch.tensor([3]), (12,)).squeeze(0).double())
    slope, hindered = slope / np.linalg.norm(slope), 0
    for row in range(4):
        x = 0.7 * (torch.tensor(slope) > 0).float() + 0.3 * noise.uniform(torch.tensor([row]), (1, 1, 12))
        flat = np.asarray(x.flatten().double())
        rise = 0.8 * float((np.where(slope > 0, 1 - flat, flat) * np.abs(slope)).sum())
        bias = -float(flat @ slope) - rise
        wanted = by_scipy(norm, flat, flat, slope, rise, 9.0, ours(norm, flat, flat, slope, rise, 9.0))
        hindered += wanted > 1.1 * rise / float(np.linalg.norm(slope, DUALS[norm]))
        plane = torch.tensor(slope)
        model = Probe(lambda z, b=bias, w=plane: torch.stack([0 * z[:, 0], z @ w + b], 1))
        got = run(model, BrendelBethge(steps=60), threat(norm, 99.0), x, torch.zeros(1, dtype=torch.int64))
        assert 1 - 1e-5 <= float(got.distance) / wanted <= 1.001
    assert hindered >= 2


def test_beside_a_curved_boundary_it_finds_the_nearest_point():
    """The boundary is x_0 = bend |rest|^2 + 1; from (0, offset, 0) the nearest point is found on a fine grid."""
    model = Probe(
        lambda flat: torch.stack([0 * flat[:, 0], flat[:, 0] - 0.5 * flat[:, 1:].square().sum(1) - 1], 1),
        bounds=(-9.0, 9.0),
    )
    t = torch.linspace(-5, 5, 200_001, dtype=torch.float64)
    for offset in (0.3, 1.0, 2.0):
        x = torch.tensor([0.0, offset, 0.0]).view(1, 1, 1, 3)
        nearest = float(((0.5 * t.square() + 1).square() + (t - offset).square()).sqrt().min())
        got = run(model, BrendelBethge(), L2(50.0, model.bounds), x, torch.tensor([0]))
        assert nearest * (1 - 1e-5) <= float(got.distance) <= nearest * 1.001


def test_where_the_margin_says_nothing_it_begins_at_random_images():
    """The logits are steps, so that climbing leads nowhere, and a random image is brought nearer by halving alone."""
    model = Probe(
        lambda flat: torch.stack([0 * flat[:, 0] + 2.0, 5.0 * (flat.sum(1) > 3.0).double() + 0 * flat[:, 0]], 1)
    )
    x, y = torch.zeros(4, 1, 4, 4), torch.zeros(4, dtype=torch.int64)
    got = run(model, BrendelBethge(), Unbounded(), x, y)
    assert got.found.all()
    sums = got.best.flatten(1).sum(1)
    assert (sums > 3.0).all()
    assert (sums < 3.0 * (1 + 3 * 2.0**-6)).all()


def test_a_point_that_is_given_is_where_it_begins(points):
    model, x, y = curved(3)
    start = noise.uniform(torch.arange(3) + 50, x.shape[1:])
    batch = Batch(x, y, torch.full_like(y, -1), y, Unbounded(), start)
    assert torch.equal(points(BrendelBethge(steps=9), model, batch)[0], start)


@pytest.mark.parametrize("steps", [1, 2, 5, 8, 9])
def test_few_steps_are_enough_to_end(steps):
    case = linear("l2", (1, 2, 3), 3)
    assert run(case.model, BrendelBethge(steps=steps), case.limit, case.x, case.y).forward.tolist() == [steps + 1] * 3
