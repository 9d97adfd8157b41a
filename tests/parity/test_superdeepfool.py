"""SuperDeepFool against a plain float64 loop over one row, written from the paper, and against closed forms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparring.attacks.deepfool import DeepFool
from sparring.attacks.superdeepfool import SuperDeepFool
from sparring.core import noise
from sparring.core.attack import Observation
from sparring.core.batch import Batch
from sparring.core.errors import UsageError
from sparring.core.model import Access
from sparring.core.threat import L2, threat
from sparring.engine.loop import run
from sparring.testing import Probe, linear

SHAPES = [(1, 2, 3), (3, 4, 4), (1, 7, 7)]
CLASSES, SIZE = 6, 20


def draw(name: int, *shape: int) -> Tensor:
    return noise.normal(torch.tensor([name]), shape).squeeze(0).double()


def curved(rows: int = 12, bounds: tuple[float, float] = (-30.0, 30.0)) -> tuple[Probe, Tensor, Tensor]:
    """A smooth network of six classes, images and its own labels; with these bounds nothing is ever clipped."""
    hidden, out = draw(1, SIZE, 16), draw(2, 16, CLASSES)
    model = Probe(lambda flat: (0.7 * flat @ hidden).tanh() @ out, bounds=bounds)
    x = noise.uniform(torch.arange(rows), (1, 4, 5))
    return model, x, model.query(x, Access.DECISION).labels


def play(attack: SuperDeepFool, model: Probe, batch: Batch) -> list[Tensor]:
    """The points (steps, d) that each row asks about, to its last."""
    state = attack.init(batch)
    points: list[list[Tensor]] = [[] for _ in batch.y]
    over = torch.zeros_like(batch.targeted)
    while not over.all():
        for row in (~over).nonzero().squeeze(1).tolist():
            points[row].append(state.x[row].flatten())
        over = over | state.done
        hit = torch.zeros_like(over)
        seen = Observation(batch, model.query(state.x, Access.GRADIENT), hit, Access.GRADIENT)
        state = attack.step(batch, state, seen)
    return [torch.stack(row) for row in points]


def sdf(model: Probe, x0: Tensor, y: int, attack: SuperDeepFool, target: int = -1) -> Tensor:
    """One row (d,) in float64: every point that is asked about, (steps, d)."""
    far, asked = 1 + attack.overshoot, []

    def ask(x: Tensor) -> tuple[bool, Tensor, Tensor]:
        asked.append(x)
        z = model.net(x[None])[0]
        jacobian = torch.autograd.functional.jacobian(lambda v: model.net(v[None])[0], x)
        return (int(z.argmax()) == target if target >= 0 else int(z.argmax()) != y), z, jacobian

    def margin(z: Tensor, jacobian: Tensor) -> tuple[float, Tensor]:
        at, sign = (target, 1) if target >= 0 else (y, -1)
        rival = max((k for k in range(len(z)) if k != at), key=lambda k: float(z[k]))
        return sign * float(z[at] - z[rival]), sign * (jacobian[at] - jacobian[rival])

    def floored(move: Tensor) -> Tensor:  # no step is shorter than 1e-4 of the range, 60 here, nor 1 % of the way
        return move * max(1.0, max(6e-3, 0.01 * float((asked[-1] - x0).norm())) / float(move.norm()))

    def onto(z: Tensor, jacobian: Tensor) -> Tensor:
        if target >= 0:
            f, w = margin(z, jacobian)
            return floored(abs(f) / float(w @ w) * w)
        moves = []
        for k in [k for k in range(len(z)) if k != y]:
            w, f = jacobian[k] - jacobian[y], float(z[k] - z[y])
            moves.append(abs(f) / float(w @ w) * w)
        return floored(min(moves, key=lambda move: float(move.norm())))

    x = x0
    fooled, z, jacobian = ask(x)
    below = margin(z, jacobian)[0]
    for walk in range(1, attack.walks + 1):
        base, r = x, torch.zeros_like(x)
        while not fooled:
            r = r + onto(z, jacobian)
            fooled, z, jacobian = ask(base + far * r)
        if walk == attack.walks:
            x = base + far * r
            break
        w = margin(z, jacobian)[1]
        x = x0 + float((base + far * r - x0) @ w) / float(w @ w) * w
        fooled, z, jacobian = ask(x)
        if fooled:
            break
    low, high, above = 0.0, 1.0, margin(z, jacobian)[0]
    for _ in range(attack.search):
        part = low + (high - low) * (0.1 + 0.9 * -below / (above - below))
        fooled, z, jacobian = ask(x0 + part * (x - x0))
        if fooled:
            high, above = part, margin(z, jacobian)[0]
        else:
            low, below = part, margin(z, jacobian)[0]
    return torch.stack(asked)


@pytest.mark.parametrize("targeted", [False, True])
def test_every_point_is_that_of_the_paper(targeted):
    model, x, y = curved()
    target = (y + 2) % CLASSES if targeted else torch.full_like(y, -1)
    attack = SuperDeepFool(walks=4)
    found = play(attack, model, Batch(x, y, target, y, L2(500.0, model.bounds)))
    same = again = 0
    for row, points in enumerate(found):
        wanted = sdf(model, x[row].flatten().double(), int(y[row]), attack, int(target[row]))
        torch.testing.assert_close(points[:4].double(), wanted[:4], rtol=1e-3, atol=1e-3)
        same += len(points) == len(wanted) and bool(((points - wanted).abs() < 1e-3).all())
        label = model.net(wanted).argmax(1)
        hit = label == target[row] if targeted else label != y[row]
        again += bool((hit[:-1] & ~hit[1:])[: -attack.search].any())
    assert same >= 9  # rounding may decide whether a projection that ends on the boundary fools
    assert again  # a projection that no longer fools, and a second walk, is among them


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", ["l2", "unbounded"])
def test_it_reaches_the_boundary_of_a_linear_model(norm, shape, rows, targeted):
    case = linear(norm, shape, rows)
    targets = torch.ones(rows, 1, dtype=torch.int64) if targeted else None
    got = run(case.model, SuperDeepFool(), case.limit, case.x, case.y, targets=targets)
    assert got.found.all()
    assert float(got.distance.min()) >= 0.5 * (1 - 1e-5)
    assert float(got.distance.max()) <= 0.5 * (1 + 1e-4)
    assert got.forward.tolist() == [7] * rows  # the image, the walk, the projection, and four looks


@pytest.mark.parametrize("offset", [0.3, 1.0, 2.0])
def test_behind_a_curved_boundary_it_comes_nearer_than_deepfool(offset):
    """The boundary is x_0 = bend |rest|^2 + 1; from (0, offset, ...) the nearest point is found on a fine grid."""
    bend = 0.5
    model = Probe(
        lambda flat: torch.stack([0 * flat[:, 0], flat[:, 0] - bend * flat[:, 1:].square().sum(1) - 1], 1),
        bounds=(-30.0, 30.0),
    )
    x, y = torch.tensor([[0.0, offset, 0.0]]).view(1, 1, 1, 3), torch.tensor([0])
    t = torch.linspace(-5, 5, 200_001, dtype=torch.float64)
    nearest = float(((bend * t.square() + 1).square() + (t - offset).square()).sqrt().min())
    limit = threat("l2", 50.0, model.bounds)
    ours, plain = (float(run(model, attack, limit, x, y).distance) for attack in (SuperDeepFool(walks=5), DeepFool()))
    assert nearest * (1 - 1e-5) <= ours < plain
    assert ours / nearest - 1 < 0.6 * (plain / nearest - 1)


def test_it_stays_in_the_bounds_and_ends_in_the_ball():
    model, x, y = curved(bounds=(0.0, 1.0))
    limit = L2(0.02, model.bounds)
    for row, points in enumerate(play(SuperDeepFool(steps=30), model, Batch(x, y, torch.full_like(y, -1), y, limit))):
        assert float(points.min()) >= 0
        assert float(points.max()) <= 1
        assert limit.contains(points[-1].view(1, 1, 4, 5), x[row : row + 1]).all()


def test_what_gives_no_direction_does_no_harm():
    x, y = torch.full((2, 1, 1, 3), 0.5), torch.tensor([0, 1])
    nets = (
        lambda flat: 0.0 * flat + torch.tensor([1.0, 0.0, -1.0]),
        lambda flat: flat * torch.nan,
        lambda flat: flat,
        lambda flat: 1e-30 * flat,
    )
    for net in nets:
        model = Probe(net)
        for points in play(SuperDeepFool(steps=12), model, Batch(x, y, torch.full_like(y, -1), y, L2(9.0))):
            assert points.isfinite().all()


def test_it_takes_so_many_steps_and_no_more():
    model = Probe(lambda flat: torch.cat([2.0 + 0 * flat[:, :1], flat[:, :1], -flat[:, 1:2]], 1))
    x, y = torch.full((2, 1, 1, 3), 0.5), torch.zeros(2, dtype=torch.int64)
    got = run(model, SuperDeepFool(steps=6), L2(9.0), x, y)
    assert not got.found.any()
    assert got.forward.tolist() == [7, 7]


def test_the_way_back_is_searched_by_false_position():
    """The margin along it is bent, so that looks fall on both sides; the bracket is that of a plain loop."""

    def margin(z: Tensor) -> Tensor:
        away = z - 2.2
        return away.sign() * away.abs().pow(1 / 3)

    model = Probe(lambda flat: torch.stack([0 * flat[:, 0], margin(flat[:, 0])], 1), bounds=(-30.0, 30.0))
    x, y = torch.zeros(1, 1, 1, 2), torch.tensor([0])
    attack = SuperDeepFool(steps=200, search=7)
    (points,) = play(attack, model, Batch(x, y, y - 1, y, L2(50.0, model.bounds)))
    values = points[:, 0].double()
    looks, end = values[-8:], float(values[-8])
    part = [v / end for v in looks.tolist()]
    low, high, below, above = 0.0, 1.0, float(margin(values[0])), float(margin(looks[0]))
    sides = set()
    for asked in part[1:]:
        wanted = low + (high - low) * (0.1 + 0.9 * -below / (above - below))
        assert asked == pytest.approx(wanted, rel=1e-4)
        at = float(margin(torch.tensor(asked * end, dtype=torch.float64)))
        sides.add(at > 0)
        low, below, high, above = (low, below, asked, at) if at > 0 else (asked, at, high, above)
    assert sides == {True, False}


def test_it_wants_two_classes():
    with pytest.raises(UsageError, match="at least 2 classes"):
        SuperDeepFool(classes=1)


def test_no_step_of_a_walk_is_shorter_than_a_hundredth_of_the_way():
    model = Probe(lambda flat: torch.stack([0 * flat[:, 0], flat[:, 0] - 0.9], 1))
    x, y = torch.full((1, 1, 1, 3), 0.1), torch.tensor([0])
    batch, attack = Batch(x, y, y - 1, y, L2(9.0)), SuperDeepFool()
    short = torch.tensor([0.8999, 0.1, 0.1]).view_as(x)
    seen = Observation(batch, model.query(short, Access.GRADIENT), y > 0, Access.GRADIENT)
    state = replace(attack.init(batch), x=short, k=y + 1)
    assert float(attack.step(batch, state, seen).x[0, 0, 0, 0]) == pytest.approx(0.8999 + 1.02 * 0.007999, abs=1e-6)
