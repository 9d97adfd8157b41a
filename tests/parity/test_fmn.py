"""FMN against a plain float64 loop over one row, written from algorithm 1, and against closed forms in four norms."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from sparring.attacks.fmn import FMN
from sparring.core import noise
from sparring.core.attack import Observation
from sparring.core.batch import Batch
from sparring.core.model import Access
from sparring.core.threat import threat
from sparring.engine.loop import run
from sparring.testing import Probe, linear

NORMS = ["linf", "l2", "l1", "l0"]
ORDER = {"linf": math.inf, "l2": 2.0, "l1": 1.0, "l0": 0.0}
DUAL = {"linf": 1.0, "l2": 2.0, "l1": math.inf}
SHAPES = [(1, 2, 3), (3, 4, 4), (1, 7, 7)]
CLASSES, SIZE = 5, 20


def draw(name: int, *shape: int) -> Tensor:
    return noise.normal(torch.tensor([name]), shape).squeeze(0).double()


def curved(rows: int = 10) -> tuple[Probe, Tensor, Tensor]:
    """A smooth network of five classes, images and its own labels; with these bounds nothing is ever clipped."""
    hidden, out = draw(1, SIZE, 16), draw(2, 16, CLASSES)
    model = Probe(lambda flat: (0.5 * flat @ hidden).tanh() @ out, bounds=(-40.0, 40.0))
    x = noise.uniform(torch.arange(rows), (1, 4, 5))
    return model, x, model.query(x, Access.DECISION).labels


def play(attack: FMN, model: Probe, batch: Batch) -> Tensor:
    """All points that are asked about, (steps + 1, n, d)."""
    state, points = attack.init(batch), []
    for _ in range(attack.steps):
        points.append(state.x.flatten(1))
        answer = model.query(state.x, Access.GRADIENT)
        hit = ((answer.labels == batch.label) == batch.targeted) & batch.threat.contains(state.x, batch.x)
        state = attack.step(batch, state, Observation(batch, answer, hit, Access.GRADIENT))
    assert state.done.all()
    return torch.stack([*points, state.x.flatten(1)])


def onto_ball(delta: Tensor, norm: str, radius: float) -> Tensor:
    """The nearest point of the ball around 0; in L1 by sorting (Duchi et al. 2008)."""
    if norm == "linf":
        return delta.clamp(-radius, radius)
    if norm == "l2":
        return delta * min(1.0, radius / max(float(delta.norm()), 1e-30))
    if norm == "l0":
        keep = delta.abs().argsort(descending=True, stable=True)[: int(radius)]
        return torch.zeros_like(delta).index_copy(0, keep, delta[keep])
    if float(delta.abs().sum()) <= radius:
        return delta
    sizes = delta.abs().sort(descending=True).values
    excess = (sizes.cumsum(0) - radius) / torch.arange(1, len(delta) + 1)
    least = float(excess[int((sizes > excess).nonzero().max())])
    return delta.sign() * (delta.abs() - least).clamp_min(0.0)


def algorithm_1(model: Probe, x0: Tensor, y: int, norm: str, attack: FMN, target: int, eps: float) -> Tensor:
    """One row (d,) in float64: every point, (steps + 1, d)."""
    delta, points = torch.zeros_like(x0), [x0]
    radius, nearest = 0.0, math.inf
    for k in range(attack.steps):
        leaf = (x0 + delta).requires_grad_()
        z = model.net(leaf[None])[0]
        at, sign = (target, -1) if target >= 0 else (y, 1)
        rival = max((j for j in range(len(z)) if j != at), key=lambda j: float(z[j].detach()))
        loss = sign * (z[at] - z[rival])  # algorithm 1 descends it; the row is fooled where it is negative
        (g,) = torch.autograd.grad(loss, leaf)
        falling = (1 + math.cos(math.pi * k / attack.steps)) / 2
        gamma = 0.001 + (attack.gamma - 0.001) * falling
        alpha = attack.step_size / 100 + (attack.step_size - attack.step_size / 100) * falling
        length = float(delta.norm(ORDER[norm])) if norm != "l0" else float((delta != 0).sum())
        fooled = float(loss.detach()) < 0
        if fooled:
            nearest = min(nearest, length)
        if norm == "l0":
            shrunk = max(1, min(nearest, math.floor(radius * (1 - gamma)), radius - 1))
            grown = max(math.floor(radius * (1 + gamma)), radius + 1)
        else:
            shrunk = min(nearest, radius * (1 - gamma))
            estimate = length + abs(float(loss.detach())) / float(g.norm(DUAL[norm]))
            beyond = 1.001 * estimate + 1e-5 * (model.bounds[1] - model.bounds[0])
            grown = radius * (1 + gamma) if nearest < math.inf else beyond
        radius = min(shrunk if fooled else grown, eps)
        delta = onto_ball(delta - alpha * g / g.norm(), norm, radius)
        points.append(x0 + delta)
    return torch.stack(points)


@pytest.mark.parametrize("eps", [15.0, 1.0])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_every_point_is_that_of_algorithm_1(norm, targeted, eps):
    if norm == "l0":
        eps *= 2
    model, x, y = curved()
    target = (y + 2) % CLASSES if targeted else torch.full_like(y, -1)
    attack = FMN(steps=25)
    points = play(attack, model, Batch(x, y, target, y, threat(norm, eps, model.bounds)))
    same = broken = 0
    for row in range(len(x)):
        wanted = algorithm_1(model, x[row].flatten().double(), int(y[row]), norm, attack, int(target[row]), eps)
        torch.testing.assert_close(points[:4, row].double(), wanted[:4], rtol=1e-4, atol=1e-4)
        same += bool(((points[:, row] - wanted).abs() < 1e-3).all())
        labels = model.net(wanted).argmax(1)
        broken += bool((labels == target[row] if targeted else labels != y[row]).any())
    assert same >= 8  # rounding may decide whether a point on the boundary fools, and which features stay in L0
    assert broken >= (5 if eps > 2 else 1)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_it_comes_within_two_percent(norm, shape, rows, targeted):
    case = linear(norm, shape, rows)
    targets = torch.ones(rows, 1, dtype=torch.int64) if targeted else None
    got = run(case.model, FMN(), case.limit, case.x, case.y, targets=targets)
    assert got.found.all()
    assert float(got.distance.min()) >= 0.5 * (1 - 1e-5)
    assert float(got.distance.max()) <= 0.5 * 1.02
    assert got.forward.tolist() == [301] * rows
    assert got.backward.tolist() == [300] * rows


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_it_breaks_just_what_the_ball_reaches(norm):
    case = linear(norm, (1, 4, 5), 4)
    for eps, wanted in ((0.499, False), (0.505, True)):
        limit = threat(norm, eps, case.model.bounds)
        assert run(case.model, FMN(), limit, case.x, case.y).found.tolist() == [wanted] * 4


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_it_is_not_left_at_a_tie(norm):
    """On straight pieces an estimate that ends on the boundary would come back to it for ever, and never fool."""
    weight, x = draw(3, 12, 3), 0.2 + 0.6 * noise.uniform(torch.arange(12), (1, 3, 4))
    model = Probe(lambda flat: 10.0 * (flat - 0.5) @ weight)
    y = model.query(x, Access.DECISION).labels
    slopes = (weight[:, y].T[:, :, None] - weight).norm(DUAL[norm], dim=1)
    logits = (x.flatten(1).double() - 0.5) @ weight
    least = ((logits.gather(1, y[:, None]) - logits) / slopes).nan_to_num(math.inf).amin(1)
    got = run(model, FMN(steps=20), threat(norm, 2.0), x, y)
    assert got.found.all()
    assert float((got.distance / least).min()) >= 1 - 1e-5
    one = Probe(lambda flat: 10.0 * torch.cat([flat, 1.0 - flat], 1))
    x = torch.tensor([0.1, 0.5, 0.57, 0.6, 0.9]).view(5, 1, 1, 1)  # 0.5 is a tie from the start
    got = run(one, FMN(steps=50), threat(norm, 0.6), x, (x.flatten() < 0.5).long())
    assert got.found.all()
    torch.testing.assert_close(got.distance, (x.flatten() - 0.5).abs().double(), rtol=1e-3, atol=2e-5)


def boxed(row: int, size: int = 12):
    """A hyperplane over [0, 1]^12 and an image near a corner, so that the box is in the way."""
    weight = draw(3, size)
    x = 0.7 * (weight > 0).float() + 0.3 * noise.uniform(torch.tensor([row]), (1, 1, size))
    room = torch.where(weight > 0, 1 - x.flatten(), x.flatten()).double()  # what is left of the way that helps
    need = 0.8 * float((room * weight.abs()).sum())
    bias = -float(x.flatten().double() @ weight) - need
    model = Probe(lambda z: torch.stack([-(z @ weight + bias) / 2, (z @ weight + bias) / 2], 1))
    return model, x.view(1, 1, 1, size), weight, room, need


def least(norm: str, weight: Tensor, room: Tensor, need: float) -> float:
    """The length of the shortest change within the bounds that raises the margin by `need`."""
    if norm == "l0":  # the fewest features whose room together is enough
        gains = room * weight.abs()
        for count in range(1, len(gains) + 1):
            if any(float(gains[list(some)].sum()) > need for some in combinations(range(len(gains)), count)):
                return count
    if norm == "l1":
        total = 0.0
        for j in weight.abs().argsort(descending=True).tolist():
            take = min(float(room[j]), need / float(weight[j].abs()))
            total, need = total + take, need - take * float(weight[j].abs())
        return total
    move = weight.abs() if norm == "l2" else torch.ones_like(weight)
    low, high = 0.0, 100.0
    for _ in range(80):
        middle = (low + high) / 2
        enough = float((middle * move).minimum(room) @ weight.abs()) >= need
        low, high = (low, middle) if enough else (middle, high)
    return float((high * move).minimum(room).norm(ORDER[norm]))


@pytest.mark.parametrize("norm", NORMS)
def test_where_the_box_is_in_the_way(norm):
    """In L0 it ranks features by their changes, not by what these achieve, and may need one more than the fewest."""
    for row in range(5):
        model, x, weight, room, need = boxed(row)
        distance = least(norm, weight, room, need)
        got = run(model, FMN(), threat(norm, 12.0), x, torch.tensor([0]))
        assert 1 - 1e-4 <= float(got.distance) / distance <= (1.2 if norm == "l0" else 1.02)


def test_fewest_features():
    """Each feature may move by one; the largest weights that together make up the gap are the answer."""
    size = 30
    weight = draw(8, size)
    order = weight.abs().sort(descending=True).values
    for count in (1, 3, 6):
        need = 0.5 * float(order[:count].sum() + order[: count - 1].sum())
        x = (weight < 0).float().view(1, 1, 5, 6)
        bias = -float(x.flatten().double() @ weight) - need
        model = Probe(lambda z, b=bias: torch.stack([-(z @ weight + b), z @ weight + b], 1))
        got = run(model, FMN(), threat("l0", 30.0), x, torch.tensor([0]))
        assert got.distance.tolist() == [count]


@pytest.mark.parametrize("norm", NORMS)
def test_what_gives_no_direction_does_no_harm(norm):
    x, y = torch.full((2, 1, 1, 3), 0.5), torch.tensor([0, 1])
    nets = (
        lambda flat: 0.0 * flat + torch.tensor([1.0, 0.0, -1.0]),
        lambda flat: flat * torch.nan,
        lambda flat: 1e-30 * flat,
    )
    for net in nets:
        model = Probe(net)
        points = play(FMN(steps=8), model, Batch(x, y, torch.full_like(y, -1), y, threat(norm, 9.0)))
        assert points.isfinite().all()
        assert ((points >= 0) & (points <= 1)).all()
