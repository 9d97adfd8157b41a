"""APGD in L1 against a plain loop over one row, written from the paper."""

from __future__ import annotations

import math

import pytest
import torch

from sparring.attacks.apgd_l1 import APGDL1
from sparring.core.batch import Batch
from sparring.core.model import Access
from sparring.core.threat import L1
from sparring.models.torch import TorchModel
from sparring.testing import puzzle

EPS = 4.0


@pytest.fixture(scope="module")
def rows(digits, net):
    x, y = digits[0][1500:], digits[1][1500:]
    right = (net(x).argmax(1) == y).nonzero().squeeze(1)[:5]
    return x[right], y[right]


def value_and_gradient(model, x, y):
    said = model.query(x, Access.GRADIENT)
    logits = said.logits.double()
    value = float(torch.nn.functional.cross_entropy(logits, torch.tensor([y])))
    return value, said.vjp(
        (logits.softmax(1) - torch.nn.functional.one_hot(torch.tensor([y]), logits.shape[1])).float()
    )


def nearest(z, x0, radius):
    """The L1 ball and the box: shrink all changes by one amount, then clip; that amount by bisection."""
    delta = (z - x0).double()

    def shrunk(t):
        return (delta.sign() * (delta.abs() - t).clamp_min(0) + x0.double()).clamp(0, 1) - x0.double()

    low, high = 0.0, float(delta.abs().max())
    if float(shrunk(0.0).abs().sum()) <= radius:
        return (x0.double() + shrunk(0.0)).float()
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if float(shrunk(middle).abs().sum()) <= radius else (middle, high)
    return (x0.double() + shrunk(high)).float()


def direction(gradient, count):
    order = gradient.flatten().abs().argsort(descending=True)[:count]
    sign = torch.zeros_like(gradient).flatten()
    sign[order] = gradient.flatten()[order].sign() / count
    return sign.view_as(gradient)


def phases(model, x0, y, steps):
    """One row (1, c, h, w): every point that is asked about, and the last one."""
    d, points, x, best = x0.numel(), [], x0, x0
    lengths = [int(0.3 * steps), int(0.3 * steps)]
    lengths.append(steps - sum(lengths))
    for number, (length, radius) in enumerate(zip(lengths, (3 * EPS, 2 * EPS, EPS), strict=True)):
        if number == 0:
            count, sparsity = d // 5, d
        else:
            x = nearest(best, x0, radius)
            sparsity = int((x != x0).sum())
            count = max(int(sparsity / 1.5), 1)
        size, every, best_value = radius, max(math.floor(0.04 * length), 1), -math.inf
        for i in range(length):
            points.append(x)
            value, gradient = value_and_gradient(model, x, y)
            if value > best_value:
                best, best_gradient, best_value = x, gradient, value
            if i and i % every == 0:
                now = int((best != x0).sum())
                if now / sparsity < 0.95:
                    size, x, gradient = radius, best, best_gradient
                else:
                    size = max(size / 1.5, radius / 10)
                count, sparsity = max(int(now / 1.5), 1), now
            x = nearest(x + size * direction(gradient, count), x0, radius)
    return torch.cat([*points, x])


@pytest.mark.parametrize("curved", [False, True])
def test_every_point_is_that_of_the_paper(net, rows, points, curved):
    """Bisections of different depth part by a rounding, after which a step along a sign may part for good."""
    case = puzzle("l1")  # where the loss goes up and down
    model, x, y = (case.model, case.x[:5], case.y[:5]) if curved else (TorchModel(net), *rows)
    steps = 200
    batch = Batch(x, y, torch.full_like(y, -1), torch.zeros_like(y), L1(EPS))
    asked = points(APGDL1(steps=steps, random_start=False), model, batch)
    assert len(asked) == steps + 1
    same = []
    for row in range(len(x)):
        wanted = phases(model, x[row : row + 1], int(y[row]), steps)
        far = (asked[:, row] - wanted).abs().flatten(1).amax(1)
        same.append(int((far < 1e-4).long().cumprod(0).sum()))
    assert sorted(same)[1] == steps + 1


@pytest.mark.parametrize("steps", [1, 2, 5, 40])
def test_phases_end_in_the_ball(net, rows, points, steps):
    """30 % of the points in 3 eps, 30 % in 2 eps, and the rest, the last one too, in eps."""
    x, y = rows
    batch = Batch(x, y, torch.full_like(y, -1), torch.zeros_like(y), L1(EPS))
    asked = points(APGDL1(steps=steps, random_start=False), TorchModel(net), batch)
    far = (asked - x).double().abs().flatten(2).sum(2).amax(1)
    first, second = int(0.3 * steps), 2 * int(0.3 * steps)
    limit = torch.tensor([3.0] * first + [2.0] * (second - first) + [1.0] * (steps + 1 - second)) * EPS
    assert bool((far <= limit + 1e-6).all())
    if steps == 40:
        assert float(far[:first].max()) > 2 * EPS
        assert float(far[first:second].max()) > EPS
