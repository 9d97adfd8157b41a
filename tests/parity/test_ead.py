"""EAD beside a plain loop over one row, written from the paper, and beside the closed form in L1."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparring.attacks.ead import EAD
from sparring.core import noise
from sparring.core.attack import Observation
from sparring.core.batch import Batch
from sparring.core.model import Access
from sparring.core.threat import L1
from sparring.engine.loop import run
from sparring.testing import Probe, linear, puzzle

SHAPES = [(1, 2, 3), (3, 4, 4), (1, 7, 7)]


def play(attack: EAD, model: Probe, batch: Batch, steps: int) -> Tensor:
    """(steps, n, c, h, w) all points that are asked about."""
    state, points = attack.init(batch), []
    for _ in range(steps):
        points.append(state.x)
        answer = model.query(state.x, Access.GRADIENT)
        hit = (answer.labels == batch.label) == batch.targeted
        state = attack.step(batch, state, Observation(batch, answer, hit, Access.GRADIENT))
    assert state.done.all()
    return torch.stack(points)


def algorithm_1(attack: EAD, model: Probe, x0: Tensor, y: int, target: int) -> list[Tensor]:
    """Every y^(k) of one image (d,), in float64, through all the searches for c."""
    label, way = (y, -1.0) if target < 0 else (target, 1.0)
    c, low, high, points = attack.weight, 0.0, math.inf, []
    for _ in range(attack.searches):
        old, point, fooled = x0, x0, False
        for k in range(attack.steps):
            points.append(point)
            leaf = point.clone().requires_grad_()
            z = model.net(leaf[None])[0]
            others = torch.cat([z[:label], z[label + 1 :]])
            attain = way * (z[label] - others.max())  # positive where it fools
            fooled |= float(attain.detach()) > 0
            f = torch.clamp(-attain, min=-attack.confidence)
            g = c * f + (leaf - x0).square().sum()
            (slope,) = torch.autograd.grad(g, leaf)
            z = point - attack.step_size * math.sqrt(1 - k / attack.steps) * slope
            new = x0.clone()
            for i in range(len(x0)):  # equation 5
                if z[i] - x0[i] > attack.beta:
                    new[i] = min(float(z[i]) - attack.beta, 1.0)
                elif z[i] - x0[i] < -attack.beta:
                    new[i] = max(float(z[i]) + attack.beta, 0.0)
            point = (new + k / (k + 3) * (new - old)).clamp(0, 1) if attack.momentum else new
            old = new
        if fooled:
            high, c = c, (low + c) / 2
        else:
            low, c = c, (10 * c if math.isinf(high) else (c + high) / 2)
    return points


@pytest.mark.parametrize("confidence", [0.0, 0.3])
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("targeted", [False, True])
def test_every_point_is_that_of_algorithm_1(targeted, momentum, confidence):
    case = puzzle("l1", targeted=targeted)
    x, y = case.x[:5], case.y[:5]
    target = torch.full_like(y, -1) if case.targets is None else case.targets[:5, 0]
    batch = Batch(x, y, target, torch.zeros_like(y), L1(50.0))
    attack = EAD(
        steps=25, searches=5, weight=0.05, beta=0.005, step_size=0.05, confidence=confidence, momentum=momentum
    )
    ours = play(attack, case.model, batch, 125).flatten(2).double()
    for row in range(5):
        wanted = algorithm_1(attack, case.model, x[row].flatten().double(), int(y[row]), int(target[row]))
        torch.testing.assert_close(ours[:, row], torch.stack(wanted), rtol=0, atol=2e-4)
    assert float((ours[-1] - ours[0]).abs().amax()) > 0.05


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_comes_within_two_percent_of_the_nearest_image(shape, rows, targeted):
    case = linear("l1", shape, rows)
    targets = torch.ones(rows, 1, dtype=torch.int64) if targeted else None
    got = run(case.model, EAD(), case.limit, case.x, case.y, targets=targets)
    assert got.found.all()
    assert float(got.distance.min()) >= 0.5 * (1 - 1e-5)
    assert float(got.distance.max()) <= 0.5 * 1.02


def boxed(row: int, size: int = 12) -> tuple[Probe, Tensor, float]:
    """A hyperplane over [0, 1]^12, an image near a corner, and the least L1 distance by filling the best first."""
    weight = noise.normal(torch.tensor([3]), (size,)).squeeze(0).double()
    x = 0.7 * (weight > 0).float() + 0.3 * noise.uniform(torch.tensor([row]), (1, 1, size))
    flat = x.flatten().double()
    room = torch.where(weight > 0, 1 - flat, flat)
    need = 0.6 * float((room * weight.abs()).sum())
    bias, distance = -float(flat @ weight) - need, 0.0
    for j in weight.abs().argsort(descending=True).tolist():
        take = min(float(room[j]), need / float(weight[j].abs()))
        distance, need = distance + take, need - take * float(weight[j].abs())

    def logits(z: Tensor) -> Tensor:
        half = (z @ weight + bias) / 2
        return torch.stack([-half, half], 1)

    return Probe(logits), x, distance


def test_where_the_box_is_in_the_way():
    for row in range(5):
        model, x, distance = boxed(row)
        got = run(model, EAD(), L1(9.0), x, torch.zeros(1, dtype=torch.int64))
        assert 1 - 1e-5 <= float(got.distance) / distance <= 1.03


def test_what_lies_beyond_eps_counts_as_fooled_in_the_search_for_the_weight():
    """Else the weight would grow for ever, and the row would never come back into the ball."""
    case = linear("l1", (1, 4, 5), 4)
    for eps, wanted in ((0.499, False), (0.515, True)):
        got = run(case.model, EAD(), L1(eps, case.model.bounds), case.x, case.y)
        assert got.found.tolist() == [wanted] * 4


def test_its_queries_are_searches_times_steps():
    case = linear("l1", (1, 2, 3), 3)
    got = run(case.model, EAD(steps=7, searches=3), case.limit, case.x, case.y)
    assert got.backward.tolist() == [21] * 3
    assert got.forward.tolist() == [22] * 3
