"""PDGD beside a plain loop over one row, written from the paper, and beside the closed form in L2."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparring.attacks.pdgd import PDGD
from sparring.core import noise
from sparring.core.attack import Observation
from sparring.core.batch import Batch
from sparring.core.model import Access
from sparring.core.threat import L2, Unbounded
from sparring.engine.loop import run
from sparring.testing import Probe, linear, puzzle

SHAPES = [(1, 2, 3), (3, 4, 4), (1, 7, 7)]


def play(attack: PDGD, model: Probe, batch: Batch, steps: int) -> Tensor:
    """(steps + 1, n, c, h, w) all points that are asked about."""
    state, points = attack.init(batch), []
    for _ in range(steps):
        points.append(state.x)
        answer = model.query(state.x, Access.GRADIENT)
        hit = (answer.labels == batch.label) == batch.targeted
        state = attack.step(batch, state, Observation(batch, answer, hit, Access.GRADIENT))
    return torch.stack([*points, state.x])


def algorithm_1(attack: PDGD, model: Probe, x0: Tensor, y: int, target: int) -> list[Tensor]:
    """Every point of one image (d,), in float64."""
    label, way = (y, -1.0) if target < 0 else (target, 1.0)
    delta = torch.zeros_like(x0).requires_grad_()
    adam = torch.optim.Adam([delta])
    dual = torch.tensor([0.0, -math.log(attack.ratio)], dtype=torch.float64)
    lam, points, steps = dual.softmax(0), [x0], attack.steps
    for i in range(steps):
        z = model.net((x0 + delta)[None])[0]
        violation = -way * (z[label] - torch.cat([z[:label], z[label + 1 :]]).max())
        length = delta.square().sum().sqrt() if i else delta.sum() * 0.0
        loss = lam[0] * length
        if violation >= 0:
            loss = loss + lam[1] * torch.nn.functional.softplus(violation)
        adam.zero_grad()
        loss.backward()
        adam.param_groups[0]["lr"] = attack.step_size * 0.01 ** (i / steps)
        adam.step()
        with torch.no_grad():
            delta.copy_((x0 + delta).clamp(0, 1) - x0)
        pace = attack.dual_step * ((steps - 1 - i) / (steps - 1) * 0.9 + 0.1)
        dual[1] = min(max(float(dual[1]) + pace * (1 if violation >= 0 else -1), math.log(1e-6)), math.log(1e6))
        lam = 0.9 * lam + 0.1 * dual.softmax(0)
        points.append((x0 + delta).detach())
    return points


@pytest.mark.parametrize("targeted", [False, True])
def test_every_point_is_that_of_algorithm_1(targeted):
    case = puzzle("l2", targeted=targeted)
    target = torch.full_like(case.y, -1) if case.targets is None else case.targets[:, 0]
    batch = Batch(case.x, case.y, target, torch.zeros_like(case.y), Unbounded())
    attack = PDGD(steps=60, step_size=0.1, dual_step=0.3, ratio=0.05)
    ours = play(attack, case.model, batch, 60).flatten(2).double()
    same = 0
    for row in range(len(case.x)):
        x0 = case.x[row].flatten().double()
        wanted = torch.stack(algorithm_1(attack, case.model, x0, int(case.y[row]), int(target[row])))
        torch.testing.assert_close(ours[:8, row], wanted[:8], rtol=0, atol=1e-5)
        same += bool(((ours[:, row] - wanted).abs() < 1e-3).all())
    assert same >= len(case.x) - 1  # rounding may decide whether a point on the boundary fools


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_comes_within_two_percent_of_the_nearest_image(shape, rows, targeted):
    case = linear("l2", shape, rows)
    targets = torch.ones(rows, 1, dtype=torch.int64) if targeted else None
    got = run(case.model, PDGD(), case.limit, case.x, case.y, targets=targets)
    assert got.found.all()
    assert float(got.distance.min()) >= 0.5 * (1 - 1e-5)
    assert float(got.distance.max()) <= 0.5 * 1.02


def test_where_the_box_is_in_the_way():
    """The nearest point is clip(x + t w) for the least t that crosses."""
    for row in range(5):
        weight = noise.normal(torch.tensor([3]), (12,)).squeeze(0).double()
        x = 0.7 * (weight > 0).float() + 0.3 * noise.uniform(torch.tensor([row]), (1, 1, 12))
        flat = x.flatten().double()
        bias = -float(flat @ weight + 0.8 * (torch.where(weight > 0, 1 - flat, flat) * weight.abs()).sum())

        def logits(z, weight=weight, bias=bias):
            half = (z @ weight + bias) / 2
            return torch.stack([-half, half], 1)

        low, high = 0.0, 100.0
        for _ in range(80):
            middle = (low + high) / 2
            crossed = float((flat + middle * weight).clamp(0, 1) @ weight) + bias >= 0
            low, high = (low, middle) if crossed else (middle, high)
        distance = float(((flat + high * weight).clamp(0, 1) - flat).norm())
        got = run(Probe(logits), PDGD(), L2(9.0), x, torch.zeros(1, dtype=torch.int64))
        assert 1 - 1e-4 <= float(got.distance) / distance <= 1.02


def test_what_lies_beyond_eps_is_drawn_back():
    case = linear("l2", (1, 4, 5), 4)
    for eps, wanted in ((0.499, False), (0.51, True)):
        got = run(case.model, PDGD(), L2(eps, case.model.bounds), case.x, case.y)
        assert got.found.tolist() == [wanted] * 4
