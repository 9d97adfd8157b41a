"""Closed forms on linear models: what the nearest image is, attacks must reach, and cannot pass."""

from __future__ import annotations

import pytest
import torch

from sparring.attacks.apgd import APGD
from sparring.attacks.brendel_bethge import BrendelBethge
from sparring.attacks.ddn import DDN
from sparring.attacks.fgsm import FGSM
from sparring.attacks.pgd import PGD
from sparring.core import noise
from sparring.core.threat import L2, threat
from sparring.engine.loop import run
from sparring.testing import DUALS, Probe, linear

SHAPES = [(1, 2, 3), (3, 4, 4), (1, 7, 7)]


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("attack", "norm"),
    [(a, n) for a in (FGSM(), PGD(steps=40), APGD(steps=40)) for n in ("linf", "l2", "l1") if n in a.norms],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_success_exactly_beyond_the_distance(attack, norm, shape, rows):
    case = linear(norm, shape, rows)
    for factor, wanted in ((0.999, False), (1.001 if attack.name == "fgsm" else 1.05, True)):
        limit = threat(norm, 0.5 * factor, case.model.bounds)
        assert run(case.model, attack, limit, case.x, case.y).found.tolist() == [wanted] * rows


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_ddn_comes_within_two_percent(shape, rows, targeted):
    case = linear("l2", shape, rows)
    targets = torch.ones(rows, 1, dtype=torch.int64) if targeted else None
    got = run(case.model, DDN(steps=300), case.limit, case.x, case.y, targets=targets)
    assert got.found.all()
    assert float(got.distance.min()) >= 0.5 * (1 - 1e-5)
    assert float(got.distance.max()) <= 0.5 * 1.02


def orthogonal(rows: int, classes: int = 5):
    """Logits are pixels; the nearest boundary of row r is that between its top two pixels."""
    x = 0.3 * noise.uniform(torch.arange(rows), (1, 1, classes))
    y = torch.arange(rows) % classes
    x[torch.arange(rows), 0, 0, y] += 1.2
    x[torch.arange(rows), 0, 0, (y + 2) % classes] += 0.6  # no tie for the second place, or descent splits
    model = Probe(lambda flat: 10.0 * flat, bounds=(-9.0, 9.0))
    top = x.flatten(1).topk(2).values
    return model, x, y, (top[:, 0] - top[:, 1]).double()


def test_many_classes():
    """To class j the distance is gap_j / sqrt(2) in L2, and gap_j / 2 in Linf."""
    model, x, y, gap = orthogonal(8)
    limit = L2(9.0, model.bounds)
    got = run(model, DDN(steps=300, radius=0.2), limit, x, y)
    ratio = got.distance / (gap / 2**0.5)
    assert float(ratio.min()) > 1 - 1e-4
    assert float(ratio.max()) < 1.02
    for row in range(8):
        for factor, wanted in ((0.99, False), (1.02, True)):
            limit = threat("linf", float(gap[row]) / 2 * factor, model.bounds)
            one = slice(row, row + 1)
            attack = PGD(steps=60, loss="margin")
            assert run(model, attack, limit, x[one], y[one]).found.tolist() == [wanted]


def boxed(row: int, size: int = 12):
    """A hyperplane over [0, 1]^12 and an image near a corner, so that the box is in the way."""
    weight = noise.normal(torch.tensor([3]), (size,)).squeeze(0).double()
    x = 0.7 * (weight > 0).float() + 0.3 * noise.uniform(torch.tensor([row]), (1, 1, size))
    flat = x.flatten().double()
    room = torch.where(weight > 0, 1 - flat, flat)  # what is left of the way that helps
    bias = -float(flat @ weight + 0.8 * (room * weight.abs()).sum())

    def logits(z):
        half = (z @ weight + bias) / 2
        return torch.stack([-half, half], 1)

    return Probe(logits), weight, bias, x


def least_move(x, weight, bias, move):
    """The nearest point of the hyperplane among x + t move, clipped to [0, 1], by bisection over t."""
    low, high = 0.0, 100.0
    for _ in range(80):
        middle = (low + high) / 2
        crossed = float((x + middle * move).clamp(0, 1) @ weight) + bias >= 0
        low, high = (low, middle) if crossed else (middle, high)
    return (x + high * move).clamp(0, 1)


BOXED = [
    (FGSM(), "linf", 1.01),
    (PGD(), "linf", 1.01),
    (PGD(steps=40, step_size=9.0), "l2", 1.01),  # long steps: short ones creep along the sphere
    (APGD(), "l2", 1.02),
    (DDN(), "l2", 1.02),
    (BrendelBethge(), "l2", 1.02),
]


@pytest.mark.parametrize(("attack", "norm", "within"), BOXED, ids=lambda v: getattr(v, "name", v))
def test_where_the_box_is_in_the_way(attack, norm, within):
    """Linf: x + t sign(w), clipped. L2: x + t w, clipped (the KKT point). Farther than without the box."""
    y, hindered = torch.zeros(1, dtype=torch.int64), 0
    for row in range(6):
        model, weight, bias, x = boxed(row)
        flat = x.flatten().double()
        nearest = least_move(flat, weight, bias, weight.sign() if norm == "linf" else weight)
        distance = float((nearest - flat).norm(torch.inf if norm == "linf" else 2))
        hindered += distance > -1.1 * float(flat @ weight + bias) / float(weight.norm(DUALS[norm]))
        if attack.minimizes:
            got = run(model, attack, L2(9.0), x, y)
            assert 1 - 1e-4 <= float(got.distance) / distance <= within
            continue
        for factor, wanted in ((0.99, False), (within, True)):
            assert run(model, attack, threat(norm, distance * factor), x, y).found.tolist() == [wanted]
    assert hindered >= 3


def test_l1_where_the_box_is_in_the_way():
    """The optimum fills the features in the order of |w|; twice that budget must be enough."""
    for row in range(3):
        model, weight, bias, x = boxed(row)
        flat = x.flatten().double()
        room, need, distance = torch.where(weight > 0, 1 - flat, flat), -float(flat @ weight + bias), 0.0
        for j in weight.abs().argsort(descending=True).tolist():
            take = min(float(room[j]), need / float(weight[j].abs()))
            distance, need = distance + take, need - take * float(weight[j].abs())
        y = torch.zeros(1, dtype=torch.int64)
        assert run(model, PGD(steps=200), threat("l1", 2 * distance), x, y).found.all()
