"""The hunt: what a row gets hangs on that row alone, what it cost is what was asked, and what is found is so."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor, nn

from sparring.attacks.fab import FAB
from sparring.attacks.sprint import Sprint
from sparring.attacks.square import Square
from sparring.auditing.hunt import DIG, POLISH, Front, Hunt, Setting, dig, tries
from sparring.core.errors import ModelError
from sparring.core.model import Access, Model, Prediction
from sparring.core.threat import Threat, threat
from sparring.testing import Probe

Rows = tuple[Tensor, Tensor]
EPS = {"linf": 0.1, "l2": 0.5, "l1": 1.5}
IDS = 1000 + 7 * torch.arange(12)


class Counting:
    """Passes every query on, and counts rows asked about and rows differentiated."""

    bounds = (0.0, 1.0)

    def __init__(self, model: Model) -> None:
        self.model, self.access = model, model.access
        self.asked, self.pulled = 0, 0

    def query(self, x: Tensor, access: Access) -> Prediction:
        answer = self.model.query(x, access)
        self.asked += len(x)
        inner = answer.vjp
        if inner is None:
            return answer

        def vjp(cotangent: Tensor, *, keep: bool = False) -> Tensor:
            self.pulled += len(cotangent)
            return inner(cotangent, keep=keep)

        return Prediction(answer.labels, answer.logits, vjp)


class Patience:
    """A `stop` that says yes after this many questions."""

    def __init__(self, turns: int) -> None:
        self.left = turns

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.fixture(scope="module")
def model(net: nn.Sequential) -> Probe:
    """The net in float64, so that a row's answer has the same bits in any company."""
    return Probe(deepcopy(net).double())


@pytest.fixture(scope="module")
def rows(digits: Rows, model: Probe) -> Rows:
    x, y = digits[0][1500:], digits[1][1500:]
    right = (model.query(x, Access.DECISION).labels == y).nonzero().squeeze(1)[: len(IDS)]
    return x[right], y[right]


def front(model: Model, rows: Rows, at: Tensor | None = None) -> Front:
    at = torch.arange(len(rows[0])) if at is None else at
    x, y = rows[0][at], rows[1][at]
    return Front(x, y, IDS[at], x.clone(), gap_of(model, x, y))


def gap_of(model: Model, x: Tensor, y: Tensor) -> Tensor:
    logits = model.query(x, Access.SCORE).logits
    right = logits.gather(1, y[:, None]).squeeze(1)
    return logits.scatter(1, y[:, None], -torch.inf).amax(1) - right


def pits(share: float) -> Probe:
    """Right everywhere but in pits, which nothing points to, over a `share` of all images: finding one is luck."""
    weights = torch.linspace(1e3, 7e3, 64, dtype=torch.float64)

    def net(flat: Tensor) -> Tensor:
        wrong = 2.0 * ((flat @ weights).frac() < share).double() - 1 + 0 * flat.sum(1)
        return torch.stack([-wrong, wrong], 1)

    return Probe(net)


@pytest.fixture(scope="module")
def pitted(digits: Rows) -> tuple[Probe, Rows]:
    model, x = pits(0.02), digits[0][1500:1600]
    x = x[model.query(x, Access.DECISION).labels == 0][: len(IDS)]
    return model, (x, torch.zeros(len(x), dtype=torch.int64))


def digging(setting: Setting, front: Front, chains: int = 2, turns: int = 2, count: int = 3) -> Hunt:
    return dig(setting, front, chains, turns, tries(setting.threat.norm, 0, count), 300_000)


def playing(setting: Setting, front: Front) -> Hunt:
    hunt = Hunt(setting, front)
    hunt.play(Sprint(steps=5), 7)
    if len(hunt.open):
        hunt.play(FAB(steps=45, beta=0.8, loss="lead"), 8, hunt.open, hunt.targets(hunt.open, 1))
    hunt.dig(9)
    return hunt


HUNTS: dict[str, Callable[[Setting, Front], Hunt]] = {
    "chains": digging,
    "one chain": lambda setting, front: digging(setting, front, 1),
    "one after the other": playing,
}
each_hunt = pytest.mark.parametrize("kind", HUNTS)
some_of_each = pytest.mark.parametrize(
    ("norm", "kind"), [("linf", "one chain"), ("linf", "chains"), ("l2", "chains"), ("l1", "one after the other")]
)


def legal_and_wrong(model: Model, limit: Threat, hunt: Hunt) -> Tensor:
    """(n,) bool, written plainly: is `best` inside the box and the ball, and not of its class?"""
    change = (hunt.best.double() - hunt.x.double()).abs().flatten(1)
    far = {"linf": change.amax(1), "l1": change.sum(1)}.get(limit.norm, change.square().sum(1).sqrt())
    inside = ((hunt.best >= 0) & (hunt.best <= 1)).flatten(1).all(1) & (far <= limit.eps + limit.slack)
    return inside & (model.query(hunt.best, Access.DECISION).labels != hunt.y)


def same(one: Hunt, two: Hunt, at: Tensor) -> None:
    """The rows `at` of `one` are, in this order, those of `two`, bit for bit."""
    for name in ("found", "best", "gap", "forward", "backward"):
        torch.testing.assert_close(getattr(one, name)[at], getattr(two, name), rtol=0, atol=0)
    assert {place for place, row in enumerate(at.tolist()) if row in one.failed} == set(two.failed)


# A row by itself


@some_of_each
def test_order_and_company_do_not_matter(norm, kind, model, rows):
    setting = Setting(model, threat(norm, EPS[norm]), 16)
    whole = HUNTS[kind](setting, front(model, rows))
    assert 2 < int(whole.found.sum()) < 11
    order = torch.randperm(len(IDS), generator=torch.Generator().manual_seed(2))
    for at in (order, order[7:8]):
        same(whole, HUNTS[kind](replace(setting), front(model, rows, at)), at)


@pytest.mark.parametrize("kind", ["chains", "one after the other"])
def test_the_width_does_not_matter(kind, model, rows):
    limit, some = threat("linf", EPS["linf"]), torch.arange(0, 12, 3)
    wanted = HUNTS[kind](Setting(model, limit, 16), front(model, rows, some))
    for width in (1, 5, 64):
        same(wanted, HUNTS[kind](Setting(model, limit, width), front(model, rows, some)), torch.arange(4))


@each_hunt
def test_luck_does_not_hang_on_company(kind, pitted):
    """Every draw of noise matters here."""
    model, rows = pitted
    setting = Setting(model, threat("linf", 0.1), 16)
    whole = HUNTS[kind](setting, front(model, rows))
    assert 0 < int(whole.found.sum()) < len(IDS)
    order = torch.randperm(len(IDS), generator=torch.Generator().manual_seed(2))
    for at in (order, order[:5]):
        same(whole, HUNTS[kind](setting, front(model, rows, at)), at)


def test_ids_seed_and_salt_make_the_noise(pitted):
    model, rows = pitted
    setting, begun = Setting(model, threat("linf", 0.1), 16), front(model, rows)

    def found(setting: Setting, begun: Front, salt: int = 0) -> list[bool]:
        hunt = Hunt(setting, begun)
        hunt.play(DIG, salt)
        return hunt.found.tolist()

    usual = found(setting, begun)
    assert found(setting, begun) == usual
    assert found(replace(setting, seed=1), begun) != usual
    assert found(setting, begun, 1) != usual
    assert found(setting, replace(begun, ids=begun.ids + 1)) != usual


def test_chains_of_a_row_draw_noise_of_their_own(pitted):
    model, rows = pitted
    setting, begun = Setting(model, threat("linf", 0.1), 16), front(model, rows)
    found = []
    for chain in range(3):
        hunt = Hunt(setting, begun, chain)
        hunt.play(DIG, 0)
        found.append(hunt.found.tolist())
    assert found[0] != found[1] != found[2]


def test_of_chains_side_by_side_the_lowest_that_finds_counts(pitted):
    model, rows = pitted
    setting, begun = Setting(model, threat("linf", 0.1), 16), front(model, rows)
    (one, many) = (digging(setting, begun, chains, turns=1, count=1) for chains in (1, 6))
    assert int(many.found.sum()) > int(one.found.sum()) > 0
    assert torch.equal(many.best[one.found], one.best[one.found])


# What it costs


@some_of_each
def test_passes_are_counted_exactly(norm, kind, model, rows):
    """One row at width 1: the passes that it is charged are those that the model made."""
    outcomes = set()
    for row in range(0, 12, 4):
        counting = Counting(model)
        begun = front(model, rows, torch.tensor([row]))
        hunt = HUNTS[kind](Setting(counting, threat(norm, EPS[norm]), 1), begun)
        assert hunt.forward.tolist() == [counting.asked]
        assert hunt.backward.tolist() == [counting.pulled]
        assert counting.pulled > 0
        outcomes.add(bool(hunt.found))
    assert outcomes == {False, True}


def test_a_row_that_holds_costs_what_was_planned(model, rows):
    limit = threat("linf", 1e-4)
    hunt = digging(Setting(model, limit, 16), front(model, rows, torch.arange(3)), 4, 2, count=1)
    assert not hunt.found.any()
    ((first, aim),) = tries("linf", 0, 1)
    backward = 4 * 2 * POLISH.steps + first.steps
    forward = 4 * 2 * (DIG.steps + 1 + POLISH.steps + 1) + first.steps + 1 + (aim is not None)
    assert hunt.backward.tolist() == [backward] * 3
    assert hunt.forward.tolist() == [forward] * 3


def test_a_model_without_gradients_is_asked_for_none(model, rows):
    counting = Counting(model)
    counting.access = Access.SCORE
    hunt = digging(Setting(counting, threat("linf", EPS["linf"]), 16), front(model, rows))
    assert counting.pulled == 0
    assert not hunt.backward.any()
    assert hunt.found.any()


# What is found


@some_of_each
def test_what_is_found_is_legal_and_wrong_and_what_holds_came_closer(norm, kind, model, rows):
    limit, begun = threat(norm, EPS[norm]), front(model, rows)
    hunt = HUNTS[kind](Setting(model, limit, 16), begun)
    assert torch.equal(legal_and_wrong(model, limit, hunt), hunt.found)
    assert limit.contains(hunt.best, hunt.x).all()
    held = ~hunt.found
    assert held.any()
    assert (hunt.gap[held] > begun.gap[held]).all()
    assert torch.equal(hunt.gap[held], gap_of(model, hunt.best, hunt.y)[held])


def test_with_eight_bits_every_point_is_an_image_of_256_levels(model, rows):
    limit = threat("linf", 20 / 255)
    begun = front(model, ((rows[0] * 255).round() / 255, rows[1]))
    hunt = digging(Setting(model, limit, 16, eight_bit=True), begun)
    assert torch.equal((hunt.best * 255).round() / 255, hunt.best)
    assert torch.equal(legal_and_wrong(model, limit, hunt), hunt.found)
    assert hunt.found.any()


def test_a_hunt_writes_on_nothing_it_is_given(model, rows):
    begun = front(model, rows)
    before = {field.name: getattr(begun, field.name).clone() for field in fields(begun)}
    hunt = digging(Setting(model, threat("linf", EPS["linf"]), 16), begun)
    assert hunt.found.any()
    assert all(torch.equal(getattr(begun, name), was) for name, was in before.items())


def test_targets_are_the_likeliest_wrong_classes_where_the_row_came_closest(model, rows):
    begun = front(model, rows)
    hunt = Hunt(Setting(model, threat("linf", 0.1), 16), replace(begun, best=begun.x.flip(3)))
    logits = model.query(hunt.best, Access.SCORE).logits
    at = torch.tensor([5, 3, 5, 8])
    place = torch.tensor([0, 1, 2, 11])
    wanted = []
    for row, rank in zip(at.tolist(), place.tolist(), strict=True):
        order = [label for label in logits[row].argsort(descending=True).tolist() if label != int(hunt.y[row])]
        wanted.append(order[rank % 9])
    assert hunt.targets(at, place).tolist() == wanted
    assert hunt.forward.tolist() == [int(row in (3, 5, 8)) for row in range(12)]  # row 5 was asked about once


# What goes wrong


class Fussy:
    """Raises when one of the images that it is asked about has a first pixel above `most`."""

    access, bounds = Access.GRADIENT, (0.0, 1.0)

    def __init__(self, model: Model, most: float) -> None:
        self.model, self.most = model, most

    def query(self, x: Tensor, access: Access) -> Prediction:
        if (x[:, 0, 0, 0] > self.most).any():
            raise ModelError("too bright a corner")
        return self.model.query(x, access)


@each_hunt
def test_a_row_that_the_model_fails_on_does_not_sink_the_others(kind, model, rows):
    limit = threat("linf", EPS["linf"])
    x = rows[0].clone()
    x[:, 0, 0, 0] = 0.0
    fine = HUNTS[kind](Setting(model, limit, 8), front(model, (x, rows[1])))
    x[[2, 9], 0, 0, 0] = 1.0  # whatever the attack does, it stays above 0.9
    begun = front(model, (x, rows[1]))
    hunt = HUNTS[kind](Setting(Fussy(model, 0.5), limit, 8), begun)
    assert sorted(hunt.failed) == [2, 9]
    assert all("too bright" in why for why in hunt.failed.values())
    others = torch.tensor([row for row in range(12) if row not in (2, 9)])
    assert not hunt.found[[2, 9]].any()
    assert torch.equal(hunt.found[others], fine.found[others])
    assert torch.equal(hunt.best[others], fine.best[others])


@each_hunt
def test_a_failure_on_the_way_does_not_hang_on_company(kind, model, rows):
    """The attacks come upon images that the model cannot answer; who does so is the row's own affair."""
    x = rows[0].clone()
    x[:, 0, 0, 0] = 0.0
    rows = (x, rows[1])
    setting = Setting(Fussy(model, 0.04), threat("linf", EPS["linf"]), 8)
    whole = HUNTS[kind](setting, front(model, rows))
    assert 0 < len(whole.failed) < 12
    assert not whole.found[list(whole.failed)].any()
    order = torch.randperm(len(IDS), generator=torch.Generator().manual_seed(2))
    for at in (order, order[:3]):
        alone = HUNTS[kind](setting, front(model, rows, at))
        assert torch.equal(alone.found, whole.found[at])
        assert torch.equal(alone.best, whole.best[at])
        assert {int(at[row]) for row in alone.failed} == set(whole.failed) & set(at.tolist())


@each_hunt
def test_a_stop_in_the_middle_finds_nothing_false(kind, model, rows):
    limit, begun = threat("linf", EPS["linf"]), front(model, rows)
    whole = HUNTS[kind](Setting(model, limit, 8), begun)
    assert not whole.stopped
    found = []
    for turns in (0, 1, 8, 40, 80):
        hunt = HUNTS[kind](Setting(model, limit, 8, stop=Patience(turns)), begun)
        assert hunt.stopped
        assert torch.equal(legal_and_wrong(model, limit, hunt), hunt.found)
        assert (whole.found | ~hunt.found).all()
        assert hunt.forward.sum() < whole.forward.sum()
        found.append(int(hunt.found.sum()))
    assert found[0] == 0 < found[-1]


def test_what_is_found_before_a_stop_is_what_would_have_been_found(pitted):
    model, rows = pitted
    limit, begun = threat("linf", 0.1), front(model, rows)
    clock = Patience(10**6)
    whole = digging(Setting(model, limit, 256, stop=clock), begun, 4, count=1)
    seen = 0
    for turns in range(0, 10**6 - clock.left, 2):
        hunt = digging(Setting(model, limit, 256, stop=Patience(turns)), begun, 4, count=1)
        seen += int(hunt.found.sum())
        assert torch.equal(hunt.best[hunt.found], whole.best[hunt.found])
    assert seen > 0


def test_who_fails_before_a_stop_is_who_would_have_failed(model, rows):
    x = rows[0].clone()
    x[:, 0, 0, 0] = 0.0
    setting = Setting(Fussy(model, 0.04), threat("linf", EPS["linf"]), 8)
    begun = front(model, (x, rows[1]))
    whole = digging(setting, begun)
    assert whole.failed
    assert whole.found.any()
    for turns in range(0, 40, 3):
        hunt = digging(replace(setting, stop=Patience(turns)), begun)
        assert set(hunt.failed) <= set(whole.failed)


def test_after_a_stop_nothing_is_played(model, rows):
    counting = Counting(model)
    hunt = Hunt(Setting(counting, threat("linf", 0.1), 8, stop=Patience(3)), front(model, rows))
    hunt.play(Square(steps=20), 0)
    asked = counting.asked
    hunt.play(Square(steps=20), 1)
    hunt.dig(2)
    assert hunt.stopped
    assert counting.asked == asked > 0
