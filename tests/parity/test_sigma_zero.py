"""Sigma-zero beside a plain loop over one row, written from the paper, and beside the fewest features there are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparring.attacks.sigma_zero import SigmaZero
from sparring.core import noise
from sparring.core.attack import Observation
from sparring.core.batch import Batch
from sparring.core.model import Access, Prediction
from sparring.core.threat import L0
from sparring.engine.loop import run
from sparring.testing import Probe, puzzle


class Exact(Probe):
    """A probe that answers in float64, so that rounding does not decide what lies below the threshold."""

    def query(self, x: Tensor, access: Access) -> Prediction:
        with torch.enable_grad():
            leaf = x.detach().flatten(1).double().requires_grad_()
            logits = self.net(leaf)

        def vjp(cotangent: Tensor, *, keep: bool = False) -> Tensor:
            (gradient,) = torch.autograd.grad(logits, leaf, cotangent, retain_graph=keep)
            return gradient.view_as(x)

        values = logits.detach()
        return Prediction(values.argmax(1), values, vjp)


def play(attack: SigmaZero, model: Probe, batch: Batch, steps: int) -> Tensor:
    """(steps, n, c, h, w) all points that are asked about."""
    state, points = attack.init(batch), []
    for _ in range(steps):
        points.append(state.x)
        answer = model.query(state.x, Access.GRADIENT)
        hit = (answer.labels == batch.label) == batch.targeted
        state = attack.step(batch, state, Observation(batch, answer, hit, Access.GRADIENT))
    return torch.stack([*points, state.x])


def algorithm_1(attack: SigmaZero, model: Probe, x0: Tensor, y: int, target: int) -> list[Tensor]:
    """Every point of one image (d,), in float64."""
    label, way = (y, -1.0) if target < 0 else (target, 1.0)
    delta = torch.zeros_like(x0).requires_grad_()
    optimiser = torch.optim.Adam([delta]) if attack.adam else torch.optim.SGD([delta])
    tau, points = attack.threshold, [x0]
    for i in range(attack.steps):
        z = model.net((x0 + delta)[None])[0]
        attain = way * (z[label] - torch.cat([z[:label], z[label + 1 :]]).max())
        count = (delta.square() / (delta.square() + attack.sigma)).sum() / len(x0)
        optimiser.zero_grad()
        (torch.clamp(-attain, min=0) + count).backward()
        eta = attack.step_size * (0.1 + 0.9 * (1 + math.cos(math.pi * i / attack.steps)) / 2)
        with torch.no_grad():
            delta.grad /= max(float(delta.grad.abs().max()), 1e-12)
            optimiser.param_groups[0]["lr"] = eta
            optimiser.step()
            delta.copy_((x0 + delta).clamp(0, 1) - x0)
            tau = min(max(tau + attack.pace * eta * (1 if attain > 0 else -1), 0.0), 1.0)
            delta[delta.abs() < tau] = 0
        points.append((x0 + delta).detach())
    return points


@pytest.mark.parametrize("adam", [True, False])
@pytest.mark.parametrize("targeted", [False, True])
def test_every_point_is_that_of_algorithm_1(targeted, adam):
    case = puzzle("l0", targeted=targeted)
    target = torch.full_like(case.y, -1) if case.targets is None else case.targets[:, 0]
    batch = Batch(case.x.double(), case.y, target, torch.zeros_like(case.y), L0(20.0))
    attack = SigmaZero(steps=40, threshold=0.2, adam=adam)
    ours = play(attack, Exact(case.model.net), batch, 40).flatten(2)
    same = 0
    for row in range(len(case.x)):
        wanted = torch.stack(
            algorithm_1(attack, case.model, case.x[row].flatten().double(), int(case.y[row]), int(target[row]))
        )
        torch.testing.assert_close(ours[:11, row], wanted[:11], rtol=0, atol=2e-3)
        same += bool(((ours[:, row] - wanted).abs() < 2e-3).all())
    # Rounding may decide on which side of the threshold a change lies, and the steps are long.
    assert same >= (10 if adam else 6)


def boxed(row: int, share: float, size: int = 30, width: float = 1.0) -> tuple[Probe, Tensor, int]:
    """A hyperplane over the box, an image in it, and the fewest features whose full use crosses it."""
    draw = noise.normal(torch.tensor([row]), (2, size)).squeeze(0).double()
    weight, x = draw[0], noise.uniform(torch.tensor([50 + row]), (1, 1, size)) * width
    flat = x.flatten().double()
    gain = torch.where(weight > 0, width - flat, flat) * weight.abs()
    need = share * float(gain.sum())
    bias = -float(flat @ weight) - need
    fewest = int((gain.sort(descending=True).values.cumsum(0) < need).sum()) + 1

    def logits(z: Tensor) -> Tensor:
        half = (z @ weight + bias) / 2
        return torch.stack([-half, half], 1)

    return Probe(logits, bounds=(0.0, width)), x, fewest


@pytest.mark.parametrize("width", [1.0, 255.0])
@pytest.mark.parametrize("targeted", [False, True])
def test_it_needs_hardly_more_features_than_there_must_be(targeted, width):
    """Never fewer; on a hyperplane in a box within 15 % on the mean, and never more than one in six too many."""
    found, least = [], []
    for row in range(12):
        model, x, fewest = boxed(row, (0.1, 0.25, 0.4)[row % 3], width=width)
        targets = torch.ones(1, 1, dtype=torch.int64) if targeted else None
        limit = L0(30.0, model.bounds)
        got = run(model, SigmaZero(steps=300), limit, x, torch.zeros(1, dtype=torch.int64), targets=targets)
        assert got.found.all()
        found.append(float(got.distance))
        least.append(fewest)
        assert fewest <= found[-1] <= fewest + max(1, fewest // 6)
    assert sum(found) <= 1.15 * sum(least)


def test_within_a_budget_it_finds_what_is_there():
    """Points beyond eps make the threshold grow, as points that fool do."""
    for row in range(6):
        model, x, fewest = boxed(row, 0.25)
        for eps, wanted in ((fewest - 1, False), (fewest + 1, True)):
            limit = L0(float(eps), model.bounds)
            got = run(model, SigmaZero(steps=300), limit, x, torch.zeros(1, dtype=torch.int64))
            assert got.found.tolist() == [wanted]
