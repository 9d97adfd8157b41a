"""Carlini and Wagner's attack beside torch's Adam in float64, a row at a time, and against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparring.attacks.cw import CW
from sparring.core import noise
from sparring.core.attack import Observation
from sparring.core.batch import Batch
from sparring.core.model import Access
from sparring.core.threat import L2
from sparring.engine.loop import run
from sparring.testing import Probe, linear

SHAPES = [(1, 2, 3), (3, 4, 4), (1, 7, 7)]
CLASSES, SIZE = 5, 20


def draw(name: int, *shape: int) -> Tensor:
    return noise.normal(torch.tensor([name]), shape).squeeze(0).double()


def curved(bounds: tuple[float, float], rows: int = 6) -> tuple[Probe, Tensor, Tensor]:
    """A smooth network of five classes over these bounds, images, a few pixels on a bound, and its own labels."""
    hidden, out = draw(1, SIZE, 16), draw(2, 16, CLASSES)
    low, wide = bounds[0], bounds[1] - bounds[0]
    model = Probe(lambda flat: (2 * ((flat - low) / wide - 0.5) @ hidden).tanh() @ out, bounds=bounds)
    x = noise.uniform(torch.arange(rows), (1, 4, 5))
    x[:, :, 0, :2], x[:, :, 1, :2] = 0.0, 1.0
    x = low + wide * x
    return model, x, model.query(x, Access.DECISION).labels


def play(attack: CW, model: Probe, batch: Batch) -> list[Tensor]:
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


def reference(model: Probe, x0: Tensor, y: int, attack: CW, target: int) -> list[Tensor]:
    """One row (d,) in float64: the points (steps, d) of every round, with torch's Adam and autograd."""
    low, high = model.bounds
    c, least, most, rounds, size = attack.c, 0.0, math.inf, [], attack.step_size
    for _ in range(attack.rounds):
        w = torch.atanh((2 * (x0 - low) / (high - low) - 1).clamp(-0.99, 0.99)).requires_grad_()
        adam = torch.optim.Adam([w], lr=size)
        points, enough, checked = [], False, math.inf
        for k in range(attack.steps):
            x = low + (high - low) * (torch.tanh(w) + 1) / 2
            z = model.net(x[None])[0]
            points.append(x.detach())
            at = target if target >= 0 else y
            other = torch.cat([z[:at], z[at + 1 :]]).max()
            f = (other - z[at] if target >= 0 else z[at] - other).clamp_min(-attack.kappa)
            cost = ((x - x0) / (high - low)).square().sum() + c * f
            gap = float((other - z[at]).detach())
            enough |= (gap if target >= 0 else -gap) < -attack.kappa
            adam.zero_grad()
            cost.backward()
            adam.step()
            if attack.abort_early and k % max(attack.steps // 10, 10) == 0:
                if float(cost.detach()) > 0.9999 * checked:
                    break
                checked = float(cost.detach())
        rounds.append(torch.stack(points))
        most, least = (min(most, c), least) if enough else (most, max(least, c))
        c, size = ((least + most) / 2, size) if math.isfinite(most) else (10 * c, min(3 * size, 0.2))
    last = low + (high - low) * (torch.tanh(w.detach()) + 1) / 2
    rounds[-1] = torch.cat([rounds[-1], last[None]])
    return rounds


@pytest.mark.parametrize("abort_early", [False, True])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(("bounds", "kappa"), [((0.0, 1.0), 0.0), ((-2.0, 3.0), 0.5)])
def test_every_point_is_that_of_adam(bounds, kappa, targeted, abort_early):
    model, x, y = curved(bounds)
    target = (y + 2) % CLASSES if targeted else torch.full_like(y, -1)
    attack = CW(steps=60, rounds=5, c=0.03, step_size=0.03, kappa=kappa, abort_early=abort_early)
    found = play(attack, model, Batch(x, y, target, y, L2(50.0, bounds)))
    same, lengths = 0, set()
    for row, points in enumerate(found):
        rounds = reference(model, x[row].flatten().double(), int(y[row]), attack, int(target[row]))
        first = len(rounds[0])
        torch.testing.assert_close(points[:first].double(), rounds[0], rtol=1e-3, atol=1e-3)
        wanted = torch.cat(rounds)
        same += len(points) == len(wanted) and bool(((points - wanted).abs() < 1e-2).all())
        lengths.add(len(points))
    assert same >= 5  # rounding may decide whether a margin of nearly kappa is enough, or a cost has come to rest
    assert lengths == {301} if not abort_early else len(lengths) > 1


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_comes_within_two_percent(shape, rows, targeted):
    """The way is an eightieth of the range, so the steps are shorter than usual, and c less."""
    case = linear("l2", shape, rows)
    targets = torch.ones(rows, 1, dtype=torch.int64) if targeted else None
    got = run(
        case.model, CW(steps=200, rounds=9, c=1e-3, step_size=0.003), case.limit, case.x, case.y, targets=targets
    )
    assert got.found.all()
    assert float(got.distance.min()) >= 0.5 * (1 - 1e-5)
    assert float(got.distance.max()) <= 0.5 * 1.02
    assert got.forward.max() <= 9 * 200 + 1


def test_where_the_box_is_in_the_way():
    """A hyperplane over [0, 1]^12 and images near a corner; the nearest point is clip(x + t w)."""
    weight = draw(3, 12)
    for row in range(4):
        x = 0.7 * (weight > 0).float() + 0.3 * noise.uniform(torch.tensor([row]), (12,)).squeeze(0)
        room = torch.where(weight > 0, 1 - x, x).double()
        need = 0.8 * float((room * weight.abs()).sum())
        bias = -float(x.double() @ weight) - need
        model = Probe(lambda z, b=bias: torch.stack([-(z @ weight + b) / 2, (z @ weight + b) / 2], 1))
        low, high = 0.0, 100.0
        for _ in range(80):
            middle = (low + high) / 2
            enough = float((middle * weight.abs()).minimum(room) @ weight.abs()) >= need
            low, high = (low, middle) if enough else (middle, high)
        nearest = float((high * weight.abs()).minimum(room).norm())
        got = run(
            model, CW(steps=500, step_size=0.05, c=0.1, rounds=7), L2(9.0), x.view(1, 1, 1, 12), torch.tensor([0])
        )
        assert 1 - 1e-4 <= float(got.distance) / nearest <= 1.02


def test_the_units_of_the_pixels_do_not_matter():
    one, ten = (curved(bounds) for bounds in ((0.0, 1.0), (-5.0, 5.0)))
    attack = CW(steps=60, rounds=4, c=0.1)
    small, large = (run(m, attack, L2(500.0, m.bounds), x, y) for m, x, y in (one, ten))
    assert small.found.all()
    torch.testing.assert_close(10 * small.distance, large.distance, rtol=1e-2, atol=0)


def test_what_gives_no_direction_does_no_harm():
    x, y = torch.tensor([[0.0, 0.5, 1.0], [0.5, 0.5, 0.5]]).view(2, 1, 1, 3), torch.tensor([0, 1])
    nets = (lambda flat: 0.0 * flat + torch.tensor([1.0, 0.0, -1.0]), lambda flat: flat * torch.nan)
    for net in nets:
        for points in play(CW(steps=10, rounds=3), Probe(net), Batch(x, y, torch.full_like(y, -1), y, L2(9.0))):
            assert points.isfinite().all()
            assert ((points >= 0) & (points <= 1)).all()


@pytest.mark.parametrize("wanted", [[0.03, 0.09, 0.2, 0.2], [0.5] * 4])  # who begins with longer ones keeps them
def test_steps_grow_threefold_as_long_as_no_c_is_enough(wanted):
    model, x = Probe(lambda flat: 0.0 * flat + torch.tensor([1.0, 0.0, -1.0])), torch.full((1, 1, 1, 3), 0.5)
    y = torch.tensor([0])
    batch, attack, sizes = Batch(x, y, y - 1, y, L2(9.0)), CW(steps=1, rounds=5, step_size=wanted[0]), []
    state = attack.init(batch)
    for _ in range(4):
        sizes.append(float(state.size))
        no = torch.zeros_like(state.done)
        state = attack.step(batch, state, Observation(batch, model.query(state.x, Access.GRADIENT), no, attack.needs))
    assert sizes == pytest.approx(wanted)


def test_c_grows_tenfold_up_to_1e10_as_long_as_none_is_enough():
    model, x = Probe(lambda flat: 0.0 * flat + torch.tensor([1.0, 0.0, -1.0])), torch.full((1, 1, 1, 3), 0.5)
    y = torch.tensor([0])
    batch, attack, found = Batch(x, y, y - 1, y, L2(9.0)), CW(steps=1, rounds=16, c=0.03), []
    state = attack.init(batch)
    for _ in range(15):
        found.append(float(state.c))
        no = torch.zeros_like(state.done)
        state = attack.step(batch, state, Observation(batch, model.query(state.x, Access.GRADIENT), no, attack.needs))
    assert found == pytest.approx([min(0.03 * 10.0**round, 1e10) for round in range(15)])


class Told:
    """An observation of one row with this margin, and no gradient."""

    def __init__(self, margin: float) -> None:
        self.margin = margin

    def value_and_grad(self, loss: object) -> tuple[Tensor, Tensor]:
        return torch.tensor([self.margin]), torch.zeros(1, 1, 1, 3)


def test_c_is_halved_between_the_largest_too_small_and_the_smallest_that_was_enough():
    """Rounds of two steps, of which one that fools is enough, be it the first or the second."""
    x, y = torch.full((1, 1, 1, 3), 0.5), torch.tensor([0])
    batch, attack, found = Batch(x, y, y - 1, y, L2(9.0)), CW(steps=2, rounds=9, c=1.0, abort_early=False), []
    state = attack.init(batch)
    for first, second in ((-1, -1), (1, -1), (-1, -1), (-1, 1), (-1, -1), (1, 1), (0, -1)):
        found.append(float(state.c))
        for margin in (first, second):
            state = attack.step(batch, state, Told(float(margin)))
    assert found == [1.0, 10.0, 5.5, 7.75, 6.625, 7.1875, 6.90625]
    assert float(state.c) == 7.046875  # a tie fools nobody
