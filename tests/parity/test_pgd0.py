"""PGD_0 against a plain float64 loop, its projection against all subsets, and the closed form on linear models."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from sparring.attacks.pgd0 import PGD0, _nearest
from sparring.core import noise
from sparring.core.batch import Batch
from sparring.core.threat import L0
from sparring.engine.loop import run
from sparring.testing import Probe, puzzle

STEPS = 15


def kept(raw: Tensor, clean: Tensor, count: int) -> Tensor:
    """The projection of one flat image, feature by feature."""
    inside = raw.clamp(0, 1)
    gain = (raw - clean) ** 2 - (raw - inside) ** 2
    best = sorted(range(len(raw)), key=lambda i: -float(gain[i]))[:count]
    found = clean.clone()
    found[best] = inside[best]
    return found


def reference(model: Probe, batch: Batch, row: int, start: Tensor, count: int, size: float) -> Tensor:
    """Croce and Hein: x <- P(x + eta grad / ||grad||_1)."""
    clean, point = batch.x[row].double().flatten(), start.double().flatten()
    aim, found = int(batch.target[row]), [point]
    label, sign = (aim, -1.0) if aim >= 0 else (int(batch.y[row]), 1.0)
    for _ in range(STEPS):
        leaf = point.clone().requires_grad_()
        loss = sign * torch.nn.functional.cross_entropy(model.net(leaf[None]), torch.tensor([label]))
        (g,) = torch.autograd.grad(loss, leaf)
        point = kept(point + size * g / g.abs().sum(), clean, count)
        found.append(point)
    return torch.stack(found)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize(("eps", "size"), [(1.0, None), (3.0, None), (4.9, 0.7)])
def test_every_point_is_the_papers(eps, size, random_start, targeted, points):
    case = puzzle("l0", targeted=targeted)
    target = torch.full_like(case.y, -1) if case.targets is None else case.targets[:, 0]
    batch = Batch(case.x, case.y, target, torch.arange(len(case.x)), L0(eps))
    found = points(PGD0(steps=STEPS, step_size=size, random_start=random_start), case.model, batch)
    starts = L0(eps).sample(case.x, batch.key) if random_start else case.x
    length = 0.15 * case.x[0].numel() if size is None else size
    for row in range(len(case.x)):
        wanted = reference(case.model, batch, row, starts[row], int(eps), length)
        torch.testing.assert_close(found[:, row].flatten(1).double(), wanted, rtol=0, atol=2e-5)
        assert int((wanted[-1] != wanted[0]).sum()) > 0


def test_the_step_left_out_goes_with_the_pixel_range(points):
    """Pixels in [0, 255] and a model that divides by 255: the same points, 255 times as large."""
    case = puzzle("l0")
    wide = Probe(lambda flat: case.model.net(flat / 255), bounds=(0.0, 255.0))
    none, key = torch.full_like(case.y, -1), torch.arange(len(case.x))
    small = points(PGD0(steps=STEPS), case.model, Batch(case.x, case.y, none, key, L0(3.0)))
    large = points(PGD0(steps=STEPS), wide, Batch(255 * case.x, case.y, none, key, L0(3.0, (0.0, 255.0))))
    torch.testing.assert_close(large / 255, small, rtol=0, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 3, 6, 9])
def test_the_projection_is_the_nearest_of_all_subsets(count):
    """Also where the point lies far outside the bounds, where clipping first would choose other features."""
    ids, differs = torch.arange(40), 0
    clean = noise.uniform(ids, (1, 2, 3))
    x = clean + 2.0 * noise.normal(ids, (1, 2, 3), 1)
    batch = Batch(clean, ids * 0, ids * 0 - 1, ids, L0(float(count)))
    found = _nearest(batch, x)
    assert batch.threat.contains(found, clean).all()
    for row in range(40):
        raw, origin = x[row].flatten().double(), clean[row].flatten().double()
        best = min(
            float(
                (torch.where(torch.isin(torch.arange(6), torch.tensor(keep)), raw.clamp(0, 1), origin) - raw).norm()
            )
            for keep in combinations(range(6), min(count, 6))
        )
        assert float((found[row].flatten().double() - raw).norm()) == pytest.approx(best, abs=1e-6)
        differs += not torch.equal(found[row], batch.project(x)[row])
    assert (differs > 3) == (count < 6)


def planes(row: int, share: float, count: int, size: int = 12) -> tuple[Probe, Tensor]:
    """A hyperplane over [0, 1]^12 that `share` of the best `count` changes reaches, and the image it starts at."""
    weight = noise.normal(torch.tensor([row]), (size,)).squeeze(0).double()
    x = noise.uniform(torch.tensor([row]), (1, 3, 4))
    flat = x.flatten().double()
    worth = torch.where(weight > 0, 1 - flat, flat) * weight.abs()
    bias = -float(flat @ weight + share * worth.topk(count).values.sum())

    def logits(z: Tensor) -> Tensor:
        half = (z @ weight + bias) / 2
        return torch.stack([-half, half], 1)

    return Probe(logits), x


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_on_a_linear_model_it_makes_the_best_changes_there_are(count, targeted):
    """The k features with the largest |w_i| times the room they have, each moved to its bound: no more can be."""
    y, targets = torch.zeros(1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.int64) if targeted else None
    for row in range(8):
        for share, wanted in ((0.999, True), (1.001, False)):
            model, x = planes(row, share, count)
            for start in (True, False):
                attack = PGD0(steps=20, step_size=1e5, random_start=start)
                got = run(model, attack, L0(float(count)), x, y, targets=targets)
                assert got.found.tolist() == [wanted]
                assert float(got.distance) <= count


def test_a_row_that_holds_costs_a_query_a_step_and_one_for_the_last_point():
    model, x = planes(0, 1.5, 2)
    got = run(model, PGD0(steps=9), L0(2.0), x, torch.zeros(1, dtype=torch.int64))
    assert not got.found.any()
    assert (int(got.forward), int(got.backward)) == (10, 9)


def test_no_budget_and_no_gradient_change_nothing(points):
    case = puzzle("l0")
    none, key = torch.full_like(case.y, -1), torch.arange(len(case.x))
    still = points(PGD0(steps=3), case.model, Batch(case.x, case.y, none, key, L0(0.0)))
    assert torch.equal(still[-1], case.x)
    flat = Probe(lambda z: z[:, :4] * 0.0)
    still = points(PGD0(steps=3, random_start=False), flat, Batch(case.x, case.y, none, key, L0(3.0)))
    assert torch.equal(still[-1], case.x)
