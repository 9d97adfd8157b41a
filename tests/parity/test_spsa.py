"""SPSA: query for query beside a plain reference with torch's own Adam, and linear models."""

from __future__ import annotations

import pytest
import torch

from sparring.attacks.spsa import SPSA
from sparring.core import noise
from sparring.core.attack import Observation
from sparring.core.batch import Batch
from sparring.core.errors import UsageError
from sparring.core.losses import margin
from sparring.core.model import Access
from sparring.core.threat import threat
from sparring.engine.loop import run
from sparring.testing import linear, puzzle


def reference(x0, key, eps, samples, delta):
    """The search in float64, one row: yields where to ask, is sent the loss there."""
    x, count = x0.clone().requires_grad_(), 0
    adam = torch.optim.Adam([x], lr=eps / 10, maximize=True)
    while True:
        at = x.detach().clone()
        value = yield at
        count += 1
        x.grad = torch.zeros_like(x)
        for _ in range(samples // 2):
            v = torch.where(noise.uniform(key, x0.shape, count)[0] < 0.5, -1.0, 1.0).double()
            for sign in (1, -1):
                around = (at + sign * delta * v).clamp(0, 1)
                x.grad += ((yield around) - value) * (around - at) / (delta**2 * samples)
                count += 1
        adam.step()
        with torch.no_grad():
            x.copy_((x0 + (x - x0).clamp(-eps, eps)).clamp(0, 1))


@pytest.mark.parametrize("targeted", [False, True])
def test_every_point_is_that_of_the_reference(targeted, scored):
    case = puzzle("linf", targeted=targeted)
    for row in range(4):
        beside = reference(case.x[row].double(), torch.tensor([77 + row]), case.limit.eps, 8, 0.02)
        point = next(beside)
        for state, value in scored(SPSA(samples=8, delta=0.02), case, row, 200, margin):
            torch.testing.assert_close(state.x[0].double(), point, atol=2e-5, rtol=0)
            point = beside.send(value)


def test_the_estimate_points_along_the_gradient(scored):
    """With signs for directions the cosine is about sqrt(m / (m + d - 1)) for m = n / 2 pairs."""
    case, cosines = puzzle("linf"), []
    for row in range(8):
        one = slice(row, row + 1)
        batch = Batch(case.x[one], case.y[one], torch.tensor([-1]), torch.tensor([0]), case.limit)
        x = 0.4 + 0.2 * case.x[one]
        truth = case.model.query(x, Access.GRADIENT)
        _, truth = Observation(batch, truth, batch.targeted, Access.GRADIENT).value_and_grad(margin)
        middle = type(case)(case.model, case.limit, x.expand(9, -1, -1, -1), case.y[one].expand(9), None)
        for state, _ in scored(SPSA(samples=50, delta=0.001), middle, row, 52, margin):
            if int(state.k) == 51:
                moved = state.mean.flatten().double()
                cosines.append(float(moved @ truth.flatten().double() / moved.norm() / truth.double().norm()))
    assert abs(sum(cosines) / 8 - (25 / 44) ** 0.5) < 0.06
    assert min(cosines) > 0.5


@pytest.mark.parametrize(("rows", "targeted"), [(1, True), (3, False), (8, True)])
@pytest.mark.parametrize("shape", [(1, 2, 3), (3, 4, 4), (1, 7, 7)])
def test_it_succeeds_just_beyond_the_distance(shape, rows, targeted):
    case = linear("linf", shape, rows)
    targets = torch.ones(rows, 1, dtype=torch.int64) if targeted else None
    for factor, wanted, steps in ((0.999, False, 400), (1.1, True, 3000)):
        limit = threat("linf", 0.5 * factor, case.model.bounds)
        got = run(case.model, SPSA(steps=steps), limit, case.x, case.y, targets=targets)
        assert got.found.tolist() == [wanted] * rows
        assert float(got.distance.max()) <= limit.eps + limit.slack
        if not wanted:
            assert got.forward.tolist() == [401] * rows


def test_samples_come_in_pairs():
    case = puzzle("linf")
    with pytest.raises(UsageError, match="even number of samples"):
        run(case.model, SPSA(samples=7), case.limit, case.x, case.y)
