"""NES: query for query beside a plain reference, its estimate beside the gradient, and linear models."""

from __future__ import annotations

import pytest
import torch

from sparring.attacks.nes import NES
from sparring.core import noise
from sparring.core.attack import Observation
from sparring.core.batch import Batch
from sparring.core.errors import UsageError
from sparring.core.losses import margin
from sparring.core.model import Access
from sparring.core.threat import threat
from sparring.engine.loop import run
from sparring.testing import linear, puzzle


def reference(x0, key, norm, eps, samples, sigma, decay):
    """PGD on the estimate in float64, one row: yields where to ask, is sent the loss there."""
    x, momentum, count = x0, torch.zeros_like(x0), 0
    while True:
        value = yield x
        count += 1
        gradient = torch.zeros_like(x0)
        for pair in range(samples // 2):
            u = noise.normal(key, x0.shape, count)[0].double()
            for sign in (1, -1):
                around = (x + sign * sigma * u).clamp(0, 1)
                gradient += ((yield around) - value) * (around - x) / (sigma**2 * samples)
                count += 1
            assert pair < samples
        momentum = decay * momentum + gradient
        step = momentum.sign() if norm == "linf" else momentum / momentum.norm()
        change = x + eps / 10 * step - x0
        if norm == "linf":
            x = (x0 + change.clamp(-eps, eps)).clamp(0, 1)
        else:
            x = x0 + change * min(1.0, eps / float(change.norm()))


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_every_point_is_that_of_the_reference(norm, targeted, scored):
    case = puzzle(norm, targeted=targeted)
    if norm == "l2":  # away from the bounds the ball's projection is only a scaling
        case = type(case)(case.model, case.limit, 0.4 + 0.2 * case.x, case.y, case.targets)
    for row in range(4):
        attack = NES(samples=8, sigma=0.02, momentum=0.5)
        beside = reference(case.x[row].double(), torch.tensor([77 + row]), norm, case.limit.eps, 8, 0.02, 0.5)
        point = next(beside)
        for state, value in scored(attack, case, row, 200, margin):
            torch.testing.assert_close(state.x[0].double(), point, atol=2e-5, rtol=0)
            point = beside.send(value)


def test_the_estimate_points_along_the_gradient(scored):
    """With n samples in d dimensions, half of them new, the cosine is about sqrt(m / (m + d + 1)) for m = n / 2."""
    case, cosines = puzzle("l2"), []
    for row in range(8):
        one = slice(row, row + 1)
        batch = Batch(case.x[one], case.y[one], torch.tensor([-1]), torch.tensor([0]), case.limit)
        x = (0.4 + 0.2 * case.x[one]).requires_grad_()
        truth = case.model.query(x, Access.GRADIENT)
        _, truth = Observation(batch, truth, batch.targeted, Access.GRADIENT).value_and_grad(margin)
        middle = type(case)(case.model, case.limit, x.detach().expand(9, -1, -1, -1), case.y[one].expand(9), None)
        for state, _ in scored(NES(samples=50), middle, row, 52, margin):
            if int(state.k) == 51:
                moved = state.momentum.flatten().double()
                cosines.append(float(moved @ truth.flatten().double() / moved.norm() / truth.double().norm()))
    assert abs(sum(cosines) / 8 - (25 / 46) ** 0.5) < 0.06
    assert min(cosines) > 0.5


@pytest.mark.parametrize(("rows", "targeted"), [(1, True), (3, False), (8, True)])
@pytest.mark.parametrize("shape", [(1, 2, 3), (3, 4, 4), (1, 7, 7)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_succeeds_just_beyond_the_distance(norm, shape, rows, targeted):
    case = linear(norm, shape, rows)
    targets = torch.ones(rows, 1, dtype=torch.int64) if targeted else None
    for factor, wanted, steps in ((0.999, False, 400), (1.05, True, 3000)):
        limit = threat(norm, 0.5 * factor, case.model.bounds)
        got = run(case.model, NES(steps=steps), limit, case.x, case.y, targets=targets)
        assert got.found.tolist() == [wanted] * rows
        assert float(got.distance.max()) <= limit.eps + limit.slack
        if not wanted:
            assert got.forward.tolist() == [401] * rows


def test_samples_come_in_pairs():
    case = puzzle("linf")
    with pytest.raises(UsageError, match="even number of samples"):
        run(case.model, NES(samples=7), case.limit, case.x, case.y)
