"""PDPGD: its proximal operators beside scipy's, its points beside a plain loop, its distances beside closed forms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize
from torch import Tensor

from sparring.attacks.pdpgd import PDPGD, proximal
from sparring.core import noise
from sparring.core.attack import Observation
from sparring.core.batch import Batch
from sparring.core.model import Access
from sparring.core.threat import L0, threat
from sparring.engine.loop import run
from sparring.testing import Probe, linear, puzzle

SHAPES = [(1, 2, 3), (3, 4, 4), (1, 7, 7)]
NORMS = ["linf", "l2", "l1", "l0"]


def cases(size: int) -> list[tuple[Tensor, Tensor, float]]:
    """Changes, metrics and costs: from next to nothing to more than the change is worth."""
    draw = noise.normal(torch.arange(20), (2, size)).double()
    return [(draw[r, 0], draw[r, 1].exp(), (0.01, 0.2, 1.0, 5.0, 40.0)[r % 5]) for r in range(20)]


def cheapest(norm: str, delta: np.ndarray, metric: np.ndarray, cost: float) -> float:
    """1/2 sum metric (z - delta)^2 + cost ||z|| where scipy finds it least, or the least over all supports."""
    size = len(delta)
    if norm == "l0":
        supports = itertools.product([0, 1], repeat=size)
        return min(0.5 * float((metric * (delta * (1 - np.array(s))) ** 2).sum()) + cost * sum(s) for s in supports)
    # Variables: z, then bounds u on its size: one of all entries, of the length, or of each entry.
    extra = size if norm == "l1" else 1

    def value(v: np.ndarray) -> float:
        return 0.5 * float((metric * (v[:size] - delta) ** 2).sum()) + cost * float(v[size:].sum())

    if norm == "l2":
        limits = [{"type": "ineq", "fun": lambda v: v[size] - np.sqrt((v[:size] ** 2).sum() + 1e-18)}]
    else:
        limits = [
            {"type": "ineq", "fun": lambda v: v[size:] - v[:size]},
            {"type": "ineq", "fun": lambda v: v[size:] + v[:size]},
        ]
    start = np.r_[delta, np.full(extra, np.abs(delta).sum())]
    found = minimize(value, start, constraints=limits, method="SLSQP", options={"ftol": 1e-14, "maxiter": 1000})
    z = found.x[:size]
    return value(np.r_[z, np.abs(z) if norm == "l1" else np.linalg.norm(z, np.inf if norm == "linf" else 2)])


@pytest.mark.parametrize("norm", NORMS)
def test_proximal_operators_cost_what_scipy_finds(norm):
    length = {"linf": np.inf, "l2": 2, "l1": 1, "l0": 0}[norm]
    zeros = 0
    for delta, metric, cost in cases(6):
        z = proximal(norm, delta[None], metric[None], torch.tensor([[cost]], dtype=torch.float64))[0]
        ours = 0.5 * float((metric * (z - delta).square()).sum()) + cost * np.linalg.norm(z.numpy(), length)
        wanted = cheapest(norm, delta.numpy(), metric.numpy(), cost)
        assert ours <= wanted * (1 + 1e-6) + 1e-8
        assert ours >= wanted * (1 - 0.02) - 1e-4  # scipy's rests a little above
        zeros += int(z.abs().max() < 1e-9)
    assert 0 < zeros < 20


@pytest.mark.parametrize("norm", NORMS)
def test_rows_are_solved_each_by_itself(norm):
    delta, metric, cost = zip(*cases(9), strict=True)
    price = torch.tensor(cost, dtype=torch.float64)[:, None]
    whole = proximal(norm, torch.stack(delta), torch.stack(metric), price)
    for row in range(20):
        alone = proximal(norm, delta[row][None], metric[row][None], price[row : row + 1])[0]
        torch.testing.assert_close(whole[row], alone, rtol=1e-12, atol=1e-12)


def solved(norm: str, w: Tensor, h: Tensor, cost: float) -> Tensor:
    """The proximal point (d,) again, with scipy's root finder where ours halves intervals."""
    if norm == "l0":
        return torch.where(0.5 * h * w**2 >= cost, w, 0.0)
    if norm == "l1":
        return torch.where(w.abs() > cost / h, w - w.sign() * cost / h, 0.0)
    if norm == "linf":
        if float((h * w.abs()).sum()) <= cost:
            return torch.zeros_like(w)
        t = brentq(
            lambda t: float((h * (w.abs() - t).clamp(min=0)).sum()) - cost, 0, float(w.abs().max()), xtol=1e-14
        )
        return w.clamp(-t, t)
    if float((h * w).norm()) <= cost:
        return torch.zeros_like(w)
    t = brentq(lambda t: float((h * w / (h * t + cost)).norm()) - 1, 0, float(w.norm()) + 1e-12, xtol=1e-14)
    return h * w * t / (h * t + cost)


def algorithm_2(attack: PDPGD, norm: str, model: Probe, x0: Tensor, y: int, target: int) -> list[Tensor]:
    """Every point of one image (d,), in float64."""
    label, way = (y, -1.0) if target < 0 else (target, 1.0)
    x, m, v = x0, torch.zeros_like(x0), torch.zeros_like(x0)
    dual = torch.tensor([0.0, -math.log(attack.ratio)], dtype=torch.float64)
    lam, points, steps = dual.softmax(0), [x0], attack.steps
    for i in range(steps):
        leaf = x.clone().requires_grad_()
        z = model.net(leaf[None])[0]
        violation = -way * (z[label] - torch.cat([z[:label], z[label + 1 :]]).max())
        g = torch.zeros_like(x)
        if violation >= 0:
            (g,) = torch.autograd.grad(torch.nn.functional.softplus(violation), leaf)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        h = (v / (1 - 0.999 ** (i + 1))).sqrt() + 1e-8
        eta = attack.step_size * 0.01 ** (i / steps)
        w = (x - eta * m / (1 - 0.9 ** (i + 1)) / h).clamp(0, 1) - x0
        x = (x0 + solved(norm, w, h, eta * float(lam[0] / lam[1]))).clamp(0, 1)
        pace = attack.dual_step * ((steps - 1 - i) / (steps - 1) * 0.9 + 0.1)
        dual[1] = min(max(float(dual[1]) + pace * (1 if violation >= 0 else -1), math.log(1e-6)), math.log(1e6))
        lam = 0.9 * lam + 0.1 * dual.softmax(0)
        points.append(x)
    return points


@pytest.mark.parametrize(("norm", "hard"), [*((norm, False) for norm in NORMS), ("l0", True)])
@pytest.mark.parametrize("targeted", [False, True])
def test_every_point_is_that_of_algorithm_2(norm, hard, targeted):
    case = puzzle(norm, targeted=targeted)
    target = torch.full_like(case.y, -1) if case.targets is None else case.targets[:, 0]
    batch = Batch(case.x, case.y, target, torch.zeros_like(case.y), threat(norm, 50.0))
    attack = PDPGD(steps=40, step_size=0.1, dual_step=0.3, ratio=0.05, hard=hard)
    state, points = attack.init(batch), []
    for _ in range(40):
        points.append(state.x)
        answer = case.model.query(state.x, Access.GRADIENT)
        hit = (answer.labels == batch.label) == batch.targeted
        state = attack.step(batch, state, Observation(batch, answer, hit, Access.GRADIENT))
    kind = "l1" if norm == "l0" and not hard else norm
    ours, same = torch.stack([*points, state.x]).flatten(2).double(), 0
    for row in range(len(case.x)):
        x0 = case.x[row].flatten().double()
        wanted = torch.stack(algorithm_2(attack, kind, case.model, x0, int(case.y[row]), int(target[row])))
        torch.testing.assert_close(ours[:6, row], wanted[:6], rtol=0, atol=1e-4)
        same += bool(((ours[:, row] - wanted).abs() < 2e-3).all())
    assert same >= len(case.x) - 2  # rounding may decide whether a point on the boundary fools


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", NORMS[:3])
def test_it_comes_within_two_percent_of_the_nearest_image(norm, shape, rows, targeted):
    case = linear(norm, shape, rows)
    targets = torch.ones(rows, 1, dtype=torch.int64) if targeted else None
    got = run(case.model, PDPGD(), case.limit, case.x, case.y, targets=targets)
    assert got.found.all()
    assert float(got.distance.min()) >= 0.5 * (1 - 1e-5)
    assert float(got.distance.max()) <= 0.5 * 1.02


@pytest.mark.parametrize("norm", NORMS[:3])
def test_what_lies_beyond_eps_is_drawn_back(norm):
    case = linear(norm, (1, 4, 5), 4)
    for eps, wanted in ((0.499, False), (0.51, True)):
        got = run(case.model, PDPGD(), threat(norm, eps, case.model.bounds), case.x, case.y)
        assert got.found.tolist() == [wanted] * 4


@pytest.mark.parametrize("hard", [False, True])
def test_few_features_more_than_there_must_be(hard):
    """L0 on a hyperplane in a box: never fewer than the fewest that can cross it, and on the mean 30 to 40 % more."""
    found, least = [], []
    for row in range(12):
        weight = noise.normal(torch.tensor([row]), (30,)).squeeze(0).double()
        x = noise.uniform(torch.tensor([50 + row]), (1, 1, 30))
        flat = x.flatten().double()
        gain = torch.where(weight > 0, 1 - flat, flat) * weight.abs()
        need = (0.1, 0.25, 0.4)[row % 3] * float(gain.sum())
        bias = -float(flat @ weight) - need

        def logits(z, weight=weight, bias=bias):
            half = (z @ weight + bias) / 2
            return torch.stack([-half, half], 1)

        got = run(Probe(logits), PDPGD(hard=hard), L0(30.0), x, torch.zeros(1, dtype=torch.int64))
        assert got.found.all()
        least.append(int((gain.sort(descending=True).values.cumsum(0) < need).sum()) + 1)
        found.append(float(got.distance))
        assert found[-1] >= least[-1]
    assert sum(found) <= (1.3 if hard else 1.4) * sum(least)
