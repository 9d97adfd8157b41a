"""Square: its plan of sides, its proposals, what it keeps, and how far it gets beside pyautoattack's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from sparring.attacks.square import AHEAD, Square, SquareState
from sparring.core import noise
from sparring.core.attack import Observation
from sparring.core.batch import Batch
from sparring.core.model import Access, Prediction
from sparring.core.threat import Threat, threat
from sparring.engine.loop import run
from sparring.models.torch import TorchModel

Rows = tuple[Tensor, Tensor]
HEIGHT, WIDTH, ROWS = 12, 10, 32
EPS = {"linf": 0.1, "l2": 0.5, "l1": 2.0}


@pytest.fixture(scope="module")
def rows(digits: Rows, net: nn.Sequential) -> Rows:
    """60 test digits that the network reads right."""
    x, y = digits[0][1500:], digits[1][1500:]
    right = (net(x).argmax(1) == y).nonzero().squeeze(1)[:60]
    return x[right], y[right]


def batch_of(limit: Threat, x: Tensor, y: Tensor | None = None, start: Tensor | None = None) -> Batch:
    y = torch.zeros(len(x), dtype=torch.int64) if y is None else y
    ids = torch.arange(len(x))
    return Batch(x, y, torch.full_like(y, -1), noise.keys(0, ids, torch.zeros_like(ids)), limit, start)


def images(channels: int = 3, rows: int = ROWS) -> Tensor:
    return noise.uniform(torch.arange(rows) + 500, (channels, HEIGHT, WIDTH))


def observed(batch: Batch, logits: Tensor) -> Observation:
    return Observation(batch, Prediction(logits.argmax(1), logits), torch.zeros_like(batch.targeted), Access.SCORE)


def at_random(attack: Square, batch: Batch, turns: int) -> Iterator[tuple[SquareState, Tensor, SquareState]]:
    """The state before and after each step, and the (n,) margins told in it: noise, with many that are equal."""
    state = attack.init(batch)
    for turn in range(turns):
        logits = (2 * noise.normal(batch.key, (4,), 1000 + turn)).round()
        others = logits.clone()
        others[:, 0] = -torch.inf  # every label is 0
        after = attack.step(batch, state, observed(batch, logits))
        yield state, others.amax(1) - logits[:, 0], after
        state = after


def proposed(attack: Square, batch: Batch, k: int) -> Tensor:
    """The proposals that follow the k-th judgement, if the best points are where the attack begins."""
    state = attack.init(batch)
    everybody, before = torch.arange(len(batch.x)), torch.full_like(state.k, k - 1)
    state = replace(state, k=before, plan=attack._plan(batch, everybody, 1 + before // AHEAD * AHEAD))
    x: Tensor = attack.step(batch, state, observed(batch, torch.zeros(len(batch.x), 4))).x
    return x


def frame(changed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First and last row and column of what is true in (n, h, w)."""
    down, across = changed.any(2), changed.any(1)
    return tuple(
        edge
        for line in (down, across)
        for edge in (line.int().argmax(1), line.shape[1] - 1 - line.flip(1).int().argmax(1))
    )  # type: ignore[return-value]  # four of them


# The plan


@pytest.mark.parametrize("size", [(28, 28), (8, 8), (7, 13)])
@pytest.mark.parametrize("steps", [5000, 10_000, 1000, 400, 37])
def test_sides_follow_the_plan_of_the_paper(steps, size):
    theirs = SquareAttack(None, n_queries=steps, p_init=0.8, resc_schedule=True)
    # Theirs rounds a share of the steps down to a 1 / 10,000, which only matters in between.
    k = torch.tensor([k for k in range(steps) if 10_000 * k % steps == 0 or not _beside_a_halving(k / steps)])
    wanted = [min(*size, max(1, round((theirs.p_selection(int(i)) * size[0] * size[1]) ** 0.5))) for i in k]
    assert len(k) > 0.97 * steps
    assert len(set(wanted)) >= 4
    assert Square(steps)._sides(torch.zeros(len(k)), k, *size).tolist() == wanted


def _beside_a_halving(share: float) -> bool:
    return any(0 < 10_000 * share - at < 1 for at in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))


def test_mixed_sides_lie_under_a_line_that_falls_to_one():
    attack, draws = Square(steps=50, p=0.3, mixed=True), torch.linspace(0, 1, 200)[:, None]
    k = torch.arange(51)
    sides = attack._sides(draws, k, 20, 20)  # (draws, k)
    line = 1 + ((0.3 * 400) ** 0.5 - 1) * (1 - k / 50)
    assert (sides >= 1).all()
    assert (sides <= line + 0.5).all()
    assert (sides.amax(0) >= line - 0.5).all()
    torch.testing.assert_close(sides, (line**draws).round(), rtol=0, atol=0)  # so small ones are drawn more often
    assert sides[:, 0].unique().tolist() == list(range(1, 12))
    assert sides[:, -1].unique().tolist() == [1]


# Proposals in Linf


@pytest.mark.parametrize("k", [1, 6, 11, 60, 300, 1500, 4000])
def test_a_proposal_pushes_one_square_of_the_stated_side_to_the_border(k):
    attack, x = Square(warm=True), images()
    batch = batch_of(threat("linf", EPS["linf"]), x)
    found = proposed(attack, batch, k)
    side = int(attack._sides(torch.zeros(1), torch.tensor([k]), HEIGHT, WIDTH))
    low, high = (x - 0.1).clamp(0, 1), (x + 0.1).clamp(0, 1)
    changed = (found != x).any(1)
    top, bottom, left, right = frame(changed)
    assert (bottom - top + 1 == side).all()
    assert (right - left + 1 == side).all()
    for row in range(ROWS):
        part = (slice(None), slice(int(top[row]), int(bottom[row]) + 1), slice(int(left[row]), int(right[row]) + 1))
        for channel, up, down in zip(found[row][part], high[row][part], low[row][part], strict=True):
            assert torch.equal(channel, up) or torch.equal(channel, down)
        outside = torch.ones_like(x[row], dtype=torch.bool)
        outside[part] = False
        assert torch.equal(found[row][outside], x[row][outside])


def test_rows_have_squares_and_signs_of_their_own():
    batch = batch_of(threat("linf", EPS["linf"]), torch.full((ROWS, 3, HEIGHT, WIDTH), 0.5))
    found = proposed(Square(warm=True), batch, 300)
    assert len(torch.unique(found, dim=0)) > 0.8 * ROWS
    some = torch.tensor([20, 3])
    assert torch.equal(proposed(Square(warm=True), batch.take(some), 300), found[some])


def test_squares_reach_every_place_up_to_the_edges():
    batch = batch_of(threat("linf", EPS["linf"]), torch.full((1500, 1, HEIGHT, WIDTH), 0.5))
    for k in (1, 300):
        changed = (proposed(Square(warm=True), batch, k) != 0.5).any(1)
        top, _, left, _ = frame(changed)
        side = int(changed[0].any(1).sum())
        assert top.unique().tolist() == list(range(HEIGHT - side + 1))
        assert left.unique().tolist() == list(range(WIDTH - side + 1))


@pytest.mark.parametrize("steps", [40, 5000])
def test_places_are_those_of_the_recurrence(steps):
    """floor(frac(shift + k / r^i) room), i = 1, 2, where r is the plastic number; in plain Python's floats."""
    low, high = 1.0, 2.0
    while high - low > 1e-15:
        r = (low + high) / 2
        low, high = (r, high) if r**3 < r + 1 else (low, r)
    batch, attack = batch_of(threat("linf", EPS["linf"]), images(1, 3)), Square(steps)
    shift = noise.uniform(batch.key, (2,), -1).tolist()
    plans = [attack._plan(batch, torch.arange(3), torch.full((3,), k)) for k in (1, 1 + 100 * AHEAD)]
    for first, plan in zip((1, 1 + 100 * AHEAD), plans, strict=True):
        for row in range(3):
            for ahead in range(AHEAD):
                side, *place = plan[row, ahead, :3].tolist()
                room = (HEIGHT + 1 - side, WIDTH + 1 - side)
                at = [(shift[row][i] + (first + ahead) / r ** (i + 1)) % 1 * room[i] for i in range(2)]
                assert place == [int(at[0]), int(at[1])]
    assert len({tuple(pair) for pair in shift}) == 3


@pytest.mark.parametrize("border", [0, 1])
def test_a_square_that_would_change_nothing_takes_the_opposite_signs(border):
    x = images()
    limit = threat("linf", EPS["linf"])
    both = ((x - 0.1).clamp(0, 1), (x + 0.1).clamp(0, 1))
    batch = batch_of(limit, x, start=both[border])
    found = proposed(Square(warm=True), batch, 300)
    changed = found != both[border]
    assert changed.flatten(1).any(1).all()
    assert torch.equal(found[changed], both[1 - border][changed])
    side = int(Square()._sides(torch.zeros(1), torch.tensor([300]), HEIGHT, WIDTH))
    sizes = changed.flatten(2).sum(2)  # (n, channels)
    assert set(sizes.unique().tolist()) == {0, side**2}
    one = (sizes > 0).sum(1)  # of three channels with random signs, 1 or 2 change in 3 / 8 each, all in 2 / 8
    assert {1, 2, 3} == set(one.tolist())


def test_proposals_start_from_the_best_point():
    batch = batch_of(threat("linf", EPS["linf"]), images())
    for _, _, after in at_random(Square(), batch, 30):
        top, bottom, left, right = frame((after.x != after.best).any(1))
        assert (after.x != after.best).flatten(1).any(1).all()  # nobody asks about the same point again
        side = int(Square()._sides(torch.zeros(1), after.k[:1], HEIGHT, WIDTH))
        assert (bottom - top < side).all()
        assert (right - left < side).all()
        assert batch.threat.contains(after.x, batch.x).all()


# What is kept


@pytest.mark.parametrize("norm", sorted(EPS))
def test_only_what_is_better_is_kept(norm):
    batch = batch_of(threat(norm, EPS[norm]), images())
    value, best = torch.full((ROWS,), -torch.inf), torch.empty_like(batch.x)
    kept = 0
    for before, margin, after in at_random(Square(steps=60), batch, 60):
        better = margin > value
        value = torch.where(better, margin, value)
        best = torch.where(better[:, None, None, None], before.x, best)
        kept += int(better.sum())
        assert torch.equal(after.value, value)
        assert torch.equal(after.best, best)
        assert (after.value >= before.value).all()
    assert ROWS < kept < 60 * ROWS
    assert after.done.all()


def test_it_begins_where_it_is_told_if_it_is_warm():
    x = images()
    limit = threat("linf", EPS["linf"])
    start = limit.project(x + 0.07, x)
    assert torch.equal(Square(warm=True).init(batch_of(limit, x, start=start)).x, start)
    assert torch.equal(Square(warm=True).init(batch_of(limit, x)).x, x)
    assert not torch.equal(Square().init(batch_of(limit, x, start=start)).x, start)


def test_it_begins_at_vertical_stripes_on_the_border():
    x = images()
    signs = (Square().init(batch_of(threat("linf", EPS["linf"]), x)).x - x).sign()
    inner = torch.where((x > 0) & (x < 1), signs, torch.nan)
    assert ((inner == inner.nanmean(2, keepdim=True)) | inner.isnan()).all()  # one sign a column
    change = Square().init(batch_of(threat("linf", EPS["linf"]), 0.4 + 0.2 * x)).x - (0.4 + 0.2 * x)
    torch.testing.assert_close(change.abs(), torch.full_like(x, 0.1))
    assert 0.4 < (change > 0).float().mean() < 0.6


# L2 and L1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("norm", "power"), [("l2", 2), ("l1", 1)])
def test_proposals_spend_the_whole_budget_where_the_bounds_leave_room(norm, power, channels):
    """From the first point on: what a square loses or never had is given to the new one."""
    batch = batch_of(threat(norm, EPS[norm], (-100.0, 100.0)), images(channels))
    for before, _, after in at_random(Square(steps=80), batch, 80):
        for state in (before, after):
            change = (state.x.double() - batch.x.double()).abs().flatten(1)
            length = change.pow(power).sum(1) ** (1 / power)
            assert (length <= EPS[norm] + batch.threat.slack).all()
            assert (length >= EPS[norm] * 0.999).all()


def bumps(side: int, upright: bool) -> Tensor:
    """(side, side) the two bumps of a window, pixel by pixel."""
    window = torch.zeros(side, side, dtype=torch.float64)
    for i in range(side):
        for j in range(side):
            along, across = (i, j) if upright else (j, i)
            half = 0 if along < side / 2 else 1
            middle = (side / 4, 3 * side / 4)[half] - 0.5
            away = max(2 * abs(along - middle), abs(across - (side - 1) / 2))
            window[i, j] = (-1.0 if half and side > 1 else 1.0) / (1 + away)
    return window


@pytest.mark.parametrize(("norm", "power"), [("l2", 2), ("l1", 1)])
def test_it_begins_at_a_grid_of_windows_a_fifth_as_high(norm, power):
    x, eps = images(2, 4), EPS[norm]
    batch = batch_of(threat(norm, eps, (-100.0, 100.0)), x)
    side = HEIGHT // 5
    signs = torch.where(noise.uniform(batch.key, (2, HEIGHT // side, WIDTH // side)) < 0.5, -1.0, 1.0)
    for row in range(4):
        wanted = torch.zeros(2, HEIGHT, WIDTH, dtype=torch.float64)
        for channel in range(2):
            for i in range(0, HEIGHT, side):
                for j in range(0, WIDTH, side):
                    sign = float(signs[row, channel, i // side, j // side])
                    wanted[channel, i : i + side, j : j + side] = sign * bumps(side, True)
        wanted = eps * wanted / wanted.abs().pow(power).sum() ** (1 / power)
        torch.testing.assert_close((Square().init(batch).x[row] - x[row]).double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [9, 80])
@pytest.mark.parametrize(("norm", "power"), [("l2", 2), ("l1", 1)])
def test_proposals_are_those_of_a_plain_loop(norm, power, steps):
    """Algorithm 3, a row and a channel at a time: what two windows held goes to the first, shared by all channels."""
    channels, eps = 2, EPS[norm]
    batch = batch_of(threat(norm, eps, (-100.0, 100.0)), images(channels, 5))

    def size(change: Tensor) -> float:
        return float(change.abs().pow(power).sum())

    attack = Square(steps=steps, p=0.3)
    for before, _, after in at_random(attack, batch, steps):
        for row in range(5):
            plan = after.plan[row, int(before.k[row]) % AHEAD].tolist()
            side, top, left, top_2, left_2 = (int(value) for value in plan[:5])
            upright = plan[5 + channels] < 0
            assert side == int(attack._sides(torch.zeros(1), after.k[:1], HEIGHT, WIDTH))
            delta = (after.best[row] - batch.x[row]).double()
            window = (slice(top, top + side), slice(left, left + side))
            rest = delta.clone()
            rest[:, window[0], window[1]] = 0.0
            rest[:, top_2 : top_2 + side, left_2 : left_2 + side] = 0.0
            budget, wanted = eps**power - size(rest), rest.clone()
            for channel in range(channels):
                old = delta[channel][window]
                fresh = old / max(size(old) ** (1 / power), 1e-12) + plan[5 + channel] * bumps(side, upright)
                fresh = fresh / max(size(fresh) ** (1 / power), 1e-12)
                wanted[channel][window] = fresh * (max(budget, 0.0) / channels) ** (1 / power)
            torch.testing.assert_close((after.x[row] - batch.x[row]).double(), wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_proposals_stay_legal_where_the_bounds_bind(norm):
    x = images().round()  # every pixel on a bound
    batch = batch_of(threat(norm, EPS[norm]), x)
    lengths = []
    for _, _, after in at_random(Square(steps=80), batch, 80):
        change = (after.x.double() - x.double()).abs().flatten(1)
        lengths.append(change.sum(1) if norm == "l1" else change.square().sum(1).sqrt())
        assert after.x.min() >= 0
        assert after.x.max() <= 1
    assert torch.stack(lengths).max() <= EPS[norm] + batch.threat.slack
    assert torch.stack(lengths)[-1].min() > 0.3 * EPS[norm]


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_a_proposal_touches_two_windows_at_most(norm):
    batch = batch_of(threat(norm, EPS[norm], (-100.0, 100.0)), images(1))
    for _, _, after in at_random(Square(), batch, 60):
        side = int(Square()._sides(torch.zeros(1), after.k[:1], HEIGHT, WIDTH))
        changed = ((after.x - after.best).abs() > 1e-6).flatten(1).sum(1)  # adding and taking a change rounds
        assert (changed <= 2 * side**2).all()
        assert (changed > 0).any()


# Strength


@pytest.mark.parametrize(("norm", "eps", "steps"), [("linf", 0.08, 1000), ("linf", 0.1, 1000), ("l2", 0.5, 400)])
def test_it_breaks_as_many_rows_as_that_of_pyautoattack(norm, eps, steps, net, rows):
    x, y = rows
    name = {"linf": "Linf", "l2": "L2"}[norm]
    with torch.random.fork_rng(devices=[]):
        theirs = SquareAttack(net, norm=name, eps=eps, n_queries=steps, p_init=0.8, seed=0).perturb(x, y)
    broken = int((net(theirs).argmax(1) != y).sum())
    ours = run(TorchModel(net), Square(steps=steps), threat(norm, eps), x, y, width=64)
    assert 5 < broken < 55
    assert int(ours.found.sum()) >= broken - 1
    assert (net(ours.best).argmax(1) != y).equal(ours.found)
