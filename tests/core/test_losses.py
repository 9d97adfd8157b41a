"""The losses: their values written plainly, their gradients against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparring.core import losses, noise
from sparring.core.batch import Batch
from sparring.core.errors import UsageError
from sparring.core.threat import Linf

CLASSES = [2, 3, 4, 11]


def case(classes: int, targeted: bool, rows: int = 6) -> tuple[Tensor, Batch]:
    key = torch.arange(rows)
    logits = 3.0 * noise.normal(key, (classes,)).double()
    y = key % classes
    target = (y + 1) % classes if targeted else torch.full_like(y, -1)
    return logits, Batch(torch.zeros(rows, 1, 1, 1), y, target, key, Linf(0.1))


def plainly(name: str, z: list[float], y: int, target: int) -> float:
    """Each loss of one row, as its paper writes it."""
    goal = y if target < 0 else target
    sign = -1.0 if target < 0 else 1.0
    others = [v for k, v in enumerate(z) if k != goal]
    top = sorted(z, reverse=True)
    p = [math.exp(v) / sum(math.exp(w) for w in z) for v in z]
    if name == "cross_entropy":
        return sign * math.log(p[goal])
    if name == "margin" or (name == "dlr" and len(z) == 2):
        return sign * (z[goal] - max(others))
    if name == "lead":
        return z[target] - z[y] if target >= 0 else max(others) - z[y]
    if name == "log_odds":
        return sign * math.log(p[goal] / (1 - p[goal]))
    if name == "dlr" and target < 0:
        return -(z[y] - max(others)) / (top[0] - top[2] + 1e-12)
    if name == "dlr":
        lowest = top[3] if len(z) > 3 else top[2]
        return -(z[y] - z[target]) / (top[0] - 0.5 * (top[2] + lowest) + 1e-12)
    if name == "tempered":
        heat = max(1.0, (max(z) - z[goal]) / 2)
        p = [math.exp(v / heat) / sum(math.exp(w / heat) for w in z) for v in z]
    assert name in ("quadratic", "tempered")
    return -sign * 0.5 * sum((p[k] - (k == goal)) ** 2 for k in range(len(z)))


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("name", sorted(losses.LOSSES))
def test_values_are_those_of_the_plain_formula(name, classes, targeted):
    logits, batch = case(classes, targeted)
    got = losses.named(name)(logits, batch)
    for row, value in enumerate(got.tolist()):
        wanted = plainly(name, logits[row].tolist(), int(batch.y[row]), int(batch.target[row]))
        assert value == pytest.approx(wanted, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("name", sorted(losses.LOSSES))
def test_gradients_are_those_of_finite_differences(name, classes, targeted):
    logits, batch = case(classes, targeted)
    loss = losses.named(name)
    leaf = logits.clone().requires_grad_()
    (got,) = torch.autograd.grad(loss(leaf, batch).sum(), leaf)
    step, wanted = 1e-5, torch.zeros_like(logits)
    for k in range(classes):
        move = torch.zeros_like(logits)
        move[:, k] = step
        wanted[:, k] = (loss(logits + move, batch) - loss(logits - move, batch)) / (2 * step)
    if name == "tempered":  # its temperature is held fixed; compare with the quadratic at that temperature
        goal = batch.y if not targeted else batch.target
        heat = ((logits.amax(1) - logits.gather(1, goal[:, None])[:, 0]) / 2).clamp_min(1.0)[:, None]
        cold = (logits / heat).requires_grad_()
        (wanted,) = torch.autograd.grad(losses.quadratic(cold, batch).sum(), cold)
        wanted = wanted / heat
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["margin", "log_odds", "dlr"])
@pytest.mark.parametrize("classes", CLASSES)
def test_signs_say_whether_the_goal_is_reached(name, classes):
    logits, batch = case(classes, False, rows=50)
    positive = losses.named(name)(logits, batch) > 0
    if name == "log_odds":
        reached = logits.softmax(1).gather(1, batch.y[:, None])[:, 0] < 0.5
    else:
        reached = logits.argmax(1) != batch.y
    assert torch.equal(positive, reached)
    assert 0 < int(reached.sum()) < 50


@pytest.mark.parametrize("name", ["cross_entropy", "margin", "log_odds", "dlr"])
def test_large_logits_stay_finite(name):
    logits, batch = case(4, False)
    leaf = (logits.float() * 1e4).requires_grad_()
    value = losses.named(name)(leaf, batch)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    assert value.isfinite().all()
    assert gradient.isfinite().all()


def test_rows_with_and_without_a_target_share_a_batch():
    logits, free = case(4, False)
    _, aimed = case(4, True)
    half = torch.arange(6) < 3
    mixed = Batch(free.x, free.y, torch.where(half, aimed.target, free.target), free.key, free.threat)
    for loss in losses.LOSSES.values():
        wanted = torch.where(half, loss(logits, aimed), loss(logits, free))
        assert torch.equal(loss(logits, mixed), wanted)


def test_an_unknown_loss_is_refused():
    with pytest.raises(UsageError, match="unknown loss 'marginn'; did you mean 'margin'"):
        losses.named("marginn")
