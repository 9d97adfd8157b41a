"""BIM against a plain float64 loop over one row, written from the paper, and against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparring.attacks.bim import BIM
from sparring.core.batch import Batch
from sparring.core.threat import threat
from sparring.engine.loop import run
from sparring.testing import Probe, Puzzle, linear, puzzle

EPS = {"linf": 0.12, "l2": 0.4}


def batch_of(case: Puzzle, norm: str) -> Batch:
    target = torch.full_like(case.y, -1) if case.targets is None else case.targets[:, 0]
    return Batch(case.x, case.y, target, torch.arange(len(case.x)), threat(norm, EPS[norm]))


def kurakin(model: Probe, norm: str, clean: Tensor, label: int, sign: int, steps: int, size: float) -> Tensor:
    """One image (1, c, h, w): X_0 = X, X_{N+1} = Clip{X_N + alpha sign(grad J)}, away from y or towards a target."""
    clean, eps = clean.double(), EPS[norm]
    point, found = clean, [clean]
    for _ in range(steps):
        leaf = point.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(model.net(leaf.flatten(1)), torch.tensor([label]))
        (g,) = torch.autograd.grad(sign * loss, leaf)
        if norm == "linf":
            point = torch.minimum(torch.maximum(point + size * g.sign(), clean - eps), clean + eps).clamp(0, 1)
        else:
            point = nearest(clean, point + size * g / g.norm(), eps)
        found.append(point)
    return torch.cat(found)


def nearest(clean: Tensor, point: Tensor, eps: float) -> Tensor:
    """clip(clean + t (point - clean)) with the largest t <= 1 that keeps the ball, by bisection."""
    low, high = 0.0, 1.0
    if float((point.clamp(0, 1) - clean).norm()) <= eps:
        return point.clamp(0, 1)
    for _ in range(80):
        t = (low + high) / 2
        out = float(((clean + t * (point - clean)).clamp(0, 1) - clean).norm()) > eps
        low, high = (low, t) if out else (t, high)
    return (clean + low * (point - clean)).clamp(0, 1)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("size", [None, 0.05])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_every_point_is_the_papers(norm, size, targeted, points):
    case, steps = puzzle(norm, targeted=targeted), 12
    batch = batch_of(case, norm)
    found = points(BIM(steps=steps, step_size=size), case.model, batch)
    length = 1.25 * EPS[norm] / steps if size is None else size
    moved = 0
    for row in range(len(case.x)):
        label, sign = (int(batch.target[row]), -1) if targeted else (int(case.y[row]), 1)
        wanted = kurakin(case.model, norm, case.x[row : row + 1], label, sign, steps, length)
        torch.testing.assert_close(found[:, row].double(), wanted, rtol=0, atol=1e-5)
        moved += float((wanted[-1] - wanted[0]).norm()) > 0.9 * EPS[norm]
    assert moved > 6


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("shape", [(1, 2, 3), (3, 4, 4), (1, 7, 7)])
def test_on_a_linear_model_the_budget_decides_and_is_used_up(shape, rows, norm):
    case = linear(norm, shape, rows)
    for factor, wanted in ((0.999, False), (1.001, True)):
        limit = threat(norm, 0.5 * factor, case.model.bounds)
        got = run(case.model, BIM(), limit, case.x, case.y)
        assert got.found.tolist() == [wanted] * rows
        torch.testing.assert_close(got.distance, torch.full_like(got.distance, limit.eps), rtol=0, atol=1e-5)


def test_a_row_that_holds_costs_a_query_a_step_and_one_for_the_last_point():
    case = puzzle("linf")
    got = run(case.model, BIM(steps=7), threat("linf", 1e-6), case.x, case.y)
    assert not got.found.any()
    assert got.forward.tolist() == [8] * len(case.x)
    assert got.backward.tolist() == [7] * len(case.x)


def test_where_it_steps_over_the_ball_it_stops_at_the_first_success():
    case = puzzle("linf")
    got = run(case.model, BIM(steps=20), threat("linf", 0.3), case.x, case.y)
    assert got.found.all()
    assert (got.forward < 21).all()
