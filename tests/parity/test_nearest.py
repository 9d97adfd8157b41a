"""Nearest against a plain float64 loop over one row, and against closed forms in three norms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparring.attacks.nearest import Nearest
from sparring.core import noise
from sparring.core.attack import Observation
from sparring.core.batch import Batch
from sparring.core.model import Access
from sparring.core.threat import threat
from sparring.engine.loop import run
from sparring.testing import Probe, linear

SHAPES = [(1, 2, 3), (3, 4, 4), (1, 7, 7)]
SIZE, CLASSES, WIDE = 20, 5, 40.0
INF = float("inf")


def draw(name: int, *shape: int) -> Tensor:
    return noise.normal(torch.tensor([name]), shape).squeeze(0).double()


def curved(rows: int) -> tuple[Probe, Tensor, Tensor]:
    """A smooth network of five classes, images and its own labels; with these bounds nothing is ever clipped."""
    hidden, out = draw(1, SIZE, 16), draw(2, 16, CLASSES)
    model = Probe(lambda flat: (0.5 * flat @ hidden).tanh() @ out, bounds=(-WIDE, WIDE))
    x = noise.uniform(torch.arange(rows), (1, 4, 5))
    return model, x, model.query(x, Access.DECISION).labels


def play(attack: Nearest, model: Probe, batch: Batch) -> Tensor:
    """All points that are asked about, (steps + 1, n, d)."""
    state, points = attack.init(batch), []
    while not state.done.any():
        points.append(state.x.flatten(1))
        answer = model.query(state.x, Access.GRADIENT)
        hit = ((answer.labels == batch.label) == batch.targeted) & batch.threat.contains(state.x, batch.x)
        state = attack.step(batch, state, Observation(batch, answer, hit, Access.GRADIENT))
    return torch.stack([*points, state.x.flatten(1)])


def length(delta: Tensor, norm: str) -> float:
    return float(delta.abs().max() if norm == "linf" else delta.norm())


def ball(delta: Tensor, radius: float, norm: str) -> Tensor:
    return (
        delta.clamp(-radius, radius) if norm == "linf" else delta * min(1.0, radius / max(length(delta, norm), 1e-30))
    )


def steepest(gradient: Tensor, norm: str) -> Tensor:
    return gradient.sign() if norm == "linf" else gradient / gradient.norm()


def reference(model: Probe, batch: Batch, row: int, norm: str, attack: Nearest) -> Tensor:
    """One row (d,) in float64: every point, (steps + 1, d)."""
    x0, y, target = batch.x[row].flatten().double(), int(batch.y[row]), int(batch.target[row])
    farthest = length((x0 - WIDE).abs().maximum((x0 + WIDE).abs()), norm)
    quarter, asked = attack.steps // 4, []
    lengths = [quarter, quarter, attack.steps - 2 * quarter]
    signs = noise.normal(batch.key[row : row + 1], x0.shape, 1)[0].double().sign()
    direction = signs / length(signs, norm)
    delta, best, nearest = torch.zeros_like(x0), None, INF
    for part, count in enumerate(lengths):
        if part == 0:
            radius = attack.near * farthest
        elif part == 1:
            radius = attack.far * farthest
            delta = radius * direction
        elif best is not None:
            delta, radius = best, nearest
        for i in range(count):
            asked.append(x0 + delta)
            fall = (1 + math.cos(math.pi * i / count)) / 2
            if part < 2:
                change, size = math.exp(math.log(0.05) + fall * math.log(0.3 / 0.05)), 0.3 + 0.7 * fall
            else:
                change, size = math.exp(math.log(0.002) + fall * math.log(0.05 / 0.002)), 0.01 + 0.29 * fall
            point = (x0 + delta).requires_grad_()
            z = model.net(point[None])[0]
            fooled = int(z.argmax()) == target if target >= 0 else int(z.argmax()) != y
            aim, sign = (target, 1.0) if target >= 0 else (y, -1.0)
            others = torch.cat([z[:aim], z[aim + 1 :]])
            scouting = part < 2 and len(asked) > 1
            loss = sign * (z.log_softmax(0)[aim] if scouting else z[aim] - others.max())
            (slope,) = torch.autograd.grad(loss, point)
            far = length(delta, norm)
            if fooled and far < nearest:
                best, nearest = delta, far
            if fooled:
                radius = min(radius, far) * (1 - change)
            elif len(asked) == 1:
                radius = min(radius, 2 * float(loss.detach().abs() / slope.norm(1 if norm == "linf" else 2)))
            else:
                radius *= 1 + (change if nearest < INF else 0.5)
            delta = ball(delta + size * radius * steepest(slope, norm), radius, norm)
    return torch.stack([*asked, x0 + delta])


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_every_point_is_that_of_a_plain_loop(norm, targeted):
    rows, attack = 6, Nearest(steps=33, near=0.002, far=0.05)
    model, x, y = curved(rows)
    target = (y + 1) % CLASSES if targeted else torch.full_like(y, -1)
    batch = Batch(x, y, target, 100 + torch.arange(rows), threat(norm, INF, model.bounds))
    points = play(attack, model, batch)
    for row in range(rows):
        wanted = reference(model, batch, row, norm, attack)
        assert points.shape[0] == len(wanted) == attack.steps + 1
        assert torch.allclose(points[:, row].double(), wanted, atol=1e-2), row


def test_in_l1_the_second_scout_sets_out_with_every_feature_changed():
    rows, attack = 4, Nearest(steps=20)
    model, x, y = Probe(lambda flat: flat[:, :3]), noise.uniform(torch.arange(4), (1, 4, 5)), torch.arange(4) % 3
    batch = Batch(x, y, torch.full_like(y, -1), 100 + torch.arange(rows), threat("l1", INF))
    start = play(attack, model, batch)[5].double()
    flat = x.flatten(1).double()
    each = 0.5 * flat.maximum(1 - flat).sum(1, keepdim=True) / SIZE
    signs = noise.normal(batch.key, x.shape[1:], 1).flatten(1).sign()
    torch.testing.assert_close(start, (flat + each * signs).clamp(0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_comes_within_two_percent_of_the_closed_form(norm, shape, rows, targeted):
    case = linear(norm, shape, rows)
    targets = torch.ones(rows, 1, dtype=torch.int64) if targeted else None
    got = run(case.model, Nearest(), case.limit, case.x, case.y, targets=targets)
    assert got.found.all()
    assert float(got.distance.min()) >= 0.5 * (1 - 1e-5)
    assert float(got.distance.max()) <= 0.5 * 1.02
    assert got.forward.tolist() == [101] * rows
    assert got.backward.tolist() == [100] * rows


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_budget_is_met_though_the_search_goes_beyond_it(norm):
    case = linear(norm, (3, 4, 4), 4)
    for eps, wanted in ((0.49, False), (0.51, True)):
        limit = threat(norm, eps, case.model.bounds)
        got = run(case.model, Nearest(), limit, case.x, case.y)
        assert got.found.tolist() == [wanted] * 4
        assert limit.contains(got.best, case.x).all()  # the last point too, of a row that holds


@pytest.mark.parametrize(("norm", "least"), [("linf", 2.5 / 16), ("l2", 2.5 / 4), ("l1", 2.5)])
def test_gradients_that_vanish_near_the_image_are_found_further_out(norm, least):
    """The logits are flat up to a sum of 2: from the clean image there is nothing to follow."""

    def logits(flat: Tensor) -> Tensor:
        way = (flat.sum(1) - 2.0).clamp_min(0.0)
        return torch.stack([torch.full_like(way, 0.5), way], 1)

    model, x, y = Probe(logits, bounds=(0.0, 1.0)), torch.zeros(5, 1, 4, 4), torch.zeros(5, dtype=torch.int64)
    got = run(model, Nearest(), threat(norm, INF), x, y)
    assert got.found.all()  # the boundary is at a sum of 2.5
    assert float(got.distance.max()) <= least * 1.02
    assert not run(model, Nearest(far=0.1), threat(norm, INF), x, y).found.any()


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7])
def test_few_steps_are_enough_to_end(steps):
    case = linear("l2", (1, 2, 3), 3)
    assert run(case.model, Nearest(steps=steps), case.limit, case.x, case.y).forward.tolist() == [steps + 1] * 3
