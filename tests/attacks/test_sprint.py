"""Sprint: where it starts, how far its steps go, and its momentum beside a plain loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from sparring.attacks.sprint import STARTS, Sprint, SprintState, blocks
from sparring.core import noise
from sparring.core.attack import Observation
from sparring.core.batch import Batch
from sparring.core.errors import UsageError
from sparring.core.model import Access, Model
from sparring.core.threat import Threat, threat
from sparring.engine.loop import run
from sparring.models.torch import TorchModel
from sparring.testing import linear

Rows = tuple[Tensor, Tensor]
NORMS = ["linf", "l2", "l1"]
EPS = {"linf": 0.08, "l2": 0.5, "l1": 1.5}


def batch_of(limit: Threat, x: Tensor, y: Tensor | None = None, start: Tensor | None = None) -> Batch:
    y = torch.zeros(len(x), dtype=torch.int64) if y is None else y
    ids = torch.arange(len(x))
    return Batch(x, y, torch.full_like(y, -1), noise.keys(0, ids, torch.zeros_like(ids)), limit, start)


def points(attack: Sprint, model: Model, batch: Batch) -> Tensor:
    """(steps + 1, n, ...) all that it asks about, whether it has won or not."""
    state, asked = attack.init(batch), []
    while True:
        asked.append(state.x)
        if state.done.all():
            return torch.stack(asked)
        assert not state.done.any()
        answer = model.query(state.x, Access.GRADIENT)
        state = attack.step(batch, state, Observation(batch, answer, torch.zeros_like(batch.targeted), attack.needs))
        assert isinstance(state, SprintState)


# Starts


@pytest.mark.parametrize("norm", NORMS)
def test_clean_given_and_random_starts(norm):
    limit, x = threat(norm, EPS[norm]), noise.uniform(torch.arange(6), (2, 5, 7))
    start = limit.sample(x, torch.arange(6) + 70)
    bare, warm = batch_of(limit, x), batch_of(limit, x, start=start)
    assert torch.equal(Sprint(start="clean").init(warm).x, x)
    assert torch.equal(Sprint(start="given").init(warm).x, start)
    assert torch.equal(Sprint(start="given").init(bare).x, x)
    assert torch.equal(Sprint(start="random").init(warm).x, limit.sample(x, bare.key))
    assert Sprint().start == "random"


@pytest.mark.parametrize("wide", [1.0, 3.0])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_start_in_blocks_moves_every_pixel_as_far_as_the_ball_allows(norm, wide):
    limit, x = threat(norm, EPS[norm]), torch.full((6, 2, 7, 5), 0.5)
    batch = batch_of(limit, x)
    begun = Sprint(start="blocks", side=3, wide=wide).init(batch).x
    assert torch.equal((begun - x).sign(), blocks(batch.key, x.shape[1:], 3))
    reach = torch.full((6,), wide * EPS[norm]).double()
    torch.testing.assert_close(limit.distance(begun, x), reach, rtol=1e-5, atol=0)


def test_blocks_are_squares_of_one_sign_cut_off_at_the_edges():
    signs = blocks(torch.arange(200), torch.Size((2, 7, 5)), 3)
    assert signs.shape == (200, 2, 7, 5)
    for top in (0, 3, 6):
        for left in (0, 3):
            square = signs[:, :, top : top + 3, left : left + 3].flatten(2)
            assert torch.equal(square, square[:, :, :1].expand_as(square))
    corners = signs[:, :, ::3, ::3].flatten(1)
    assert set(corners.unique().tolist()) == {-1.0, 1.0}
    assert (corners.mean(0).abs() < 0.35).all()  # each is as often up as down, 0.07 being its deviation
    assert torch.equal(blocks(torch.tensor([7]), torch.Size((2, 7, 5)), 3)[0], signs[7])


def test_an_unknown_start_is_an_error():
    batch = batch_of(threat("linf", 0.1), torch.zeros(1, 1, 2, 2))
    with pytest.raises(UsageError, match="unknown start 'blocs'; did you mean 'blocks'"):
        Sprint(start="blocs").init(batch)


# Steps


def test_steps_fall_evenly_from_the_first_to_nothing():
    """Without momentum, on a plane, and too few to reach the border: eps first (1 - k / steps) each."""
    case = linear("linf", (1, 3, 4), 3)
    attack = Sprint(steps=8, first=0.2, start="clean", momentum=1.0)
    asked = points(attack, case.model, batch_of(threat("linf", 2.0, case.model.bounds), case.x, case.y))
    assert len(asked) == 9
    moves = asked.diff(dim=0).abs().double().flatten(1)
    wanted = 2.0 * 0.2 * (1 - torch.arange(8).double() / 8)
    torch.testing.assert_close(moves, wanted[:, None].expand_as(moves), rtol=1e-4, atol=1e-5)


def algorithm(net: nn.Module, limit: Threat, x0: Tensor, y: int, attack: Sprint, first: float) -> list[Tensor]:
    """One row (1, c, h, w), step by step: equations 3 and 4 of Croce and Hein 2020, on the margin, in a wide ball."""
    xs, x = [x0], x0
    for k in range(attack.steps):
        leaf = x.clone().requires_grad_()
        logits = net(leaf)[0]
        margin = logits[torch.arange(len(logits)) != y].max() - logits[y]
        (gradient,) = torch.autograd.grad(margin, leaf)
        ball = threat(limit.norm, limit.eps * (1 + (attack.wide - 1) * max(0.0, 1 - (k + 1) / (0.6 * attack.steps))))
        size = ball.eps * first * (1 - k / attack.steps)
        z = ball.project(x + size * limit.steepest(gradient, x), x0)
        before, alpha = (xs[-2], 0.75) if k else (x, 1.0)
        x = ball.project(x + alpha * (z - x) + (1 - alpha) * (x - before), x0)
        xs.append(x)
    return xs


@pytest.mark.parametrize("options", [{}, {"wide": 3.0, "first": 0.5}], ids=["usual", "wide"])
@pytest.mark.parametrize("norm", NORMS)
def test_the_momentum_is_that_of_apgd(norm, options, net, digits):
    x, y = digits[0][1500:1504], digits[1][1500:1504]
    attack, limit = Sprint(steps=10, start="clean", **options), threat(norm, EPS[norm])
    asked = points(attack, TorchModel(net), batch_of(limit, x, y))
    straight = points(replace(attack, momentum=1.0), TorchModel(net), batch_of(limit, x, y))
    assert (asked - straight).abs().max() > 1e-3
    for row in range(4):
        wanted = torch.cat(algorithm(net, limit, x[row : row + 1], int(y[row]), attack, options.get("first", 2.0)))
        torch.testing.assert_close(asked[:, row], wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_all_that_it_asks_about_is_legal(norm, net, digits):
    x, y = digits[0][1500:1520], digits[1][1500:1520]
    limit = threat(norm, EPS[norm])
    for start in STARTS:
        asked = points(Sprint(start=start), TorchModel(net), batch_of(limit, x, y))
        change = (asked.double() - x.double()).abs().flatten(2)
        far = {"linf": change.amax(2), "l1": change.sum(2)}.get(norm, change.square().sum(2).sqrt())
        assert far.max() <= EPS[norm] + limit.slack
        assert asked.min() >= 0
        assert asked.max() <= 1


@pytest.mark.parametrize("loss", ["margin", "lead", "log_odds"])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("norm", NORMS)
def test_it_breaks_just_what_the_ball_reaches(norm, start, loss):
    """Rows 0.5 from the boundary of a linear model; a second step mends what a bad start or L1's corners cost."""
    case = linear(norm, (1, 3, 4), 4, distance=0.5)
    attack = Sprint(steps=20, start=start, loss=loss)
    for eps, wanted in ((0.499, False), (0.51, True)):
        limit = threat(norm, eps, case.model.bounds)
        assert run(case.model, attack, limit, case.x, case.y).found.tolist() == [wanted] * 4


# A ball that is wide at first


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_a_wide_ball_shrinks_evenly_and_ends_at_its_size(norm):
    limit = threat(norm, EPS[norm], (-100.0, 100.0))
    x = noise.uniform(torch.arange(3), (1, 6, 6))
    net = TorchModel(nn.Sequential(nn.Flatten(), nn.Linear(36, 4)), bounds=limit.bounds)
    asked = points(Sprint(steps=10, first=50.0, start="clean", momentum=1.0, wide=5.0), net, batch_of(limit, x))
    distances = torch.stack([limit.distance(point, x) for point in asked]) / limit.eps
    wanted = [0.0] + [1 + 4 * max(0.0, 1 - k / 6) for k in range(1, 10)]
    for turn, far in enumerate(wanted):
        torch.testing.assert_close(distances[turn], torch.full((3,), far, dtype=torch.float64), rtol=1e-4, atol=1e-6)
    assert limit.contains(asked[6], x).all()


def test_a_wide_ball_finds_what_lies_behind_a_flat_place():
    """The logits do not change within 1.5 eps of the image, except along a ridge: only from afar it is seen."""
    bounds = (-10.0, 10.0)
    goal = torch.zeros(16).index_fill(0, torch.tensor([3]), 1.0)

    class Moat(nn.Module):
        def forward(self, x):
            delta = x.flatten(1)
            outside = torch.relu(delta.norm(dim=1) - 0.6)  # a slope that leads to the ridge, from 1.5 eps on
            along = delta @ goal
            ridge = torch.sigmoid(400 * (along / delta.norm(dim=1).clamp_min(1e-6) - 0.98)) * (along > 0.3)
            lead = 2 * ridge - 1 + outside * along
            return torch.stack([-lead, lead], 1)

    limit = threat("l2", 0.4, bounds)
    x, y = torch.zeros(4, 1, 4, 4), torch.zeros(4, dtype=torch.int64)
    reached = {}
    for wide in (1.0, 4.0):
        attack = Sprint(steps=20, loss="margin", wide=wide)
        reached[wide] = int(run(TorchModel(Moat(), bounds=bounds), attack, limit, x, y).found.sum())
    assert reached == {1.0: 0, 4.0: 4}


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_wide_ball_is_each_rows_own(norm, net, digits):
    """Rows that sit side by side are at different steps, and in balls of different size."""
    attack, limit = Sprint(steps=8, loss="log_odds", wide=3.0), threat(norm, EPS[norm] / 2)
    together, staggered = (run(TorchModel(net), attack, limit, *digits, width=width) for width in (64, 16))
    assert torch.equal(together.found, staggered.found)
    assert torch.equal(together.forward, staggered.forward)
    torch.testing.assert_close(together.best, staggered.best, rtol=0, atol=1e-5)
