"""The cascade: what comes next, how much of it, and who meets it, in plain numbers."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from sparring.attacks.sprint import Sprint
from sparring.attacks.square import Square
from sparring.auditing.cascade import (
    FEW,
    FULL,
    PROFILES,
    STILL_FALLING,
    Cascade,
    Profile,
    Stage,
    nearest,
    profile,
)
from sparring.core.errors import UsageError

Fate = Callable[[Stage, int], int]  # how many rows a stage breaks, of those that it meets
PLAN = Profile("test", opening=9, work=8, deepest=16)


def nobody(stage: Stage, met: int) -> int:
    return 0


def play(cascade: Cascade, held: int, fate: Fate = nobody) -> list[tuple[Stage, int, int]]:
    """Every stage with the rows that it met and broke, until the end."""
    fell, stages = 0, []
    while (stage := cascade.next(held, fell)) is not None:
        met = stage.rows
        fell = fate(stage, met)
        assert 0 <= met <= held
        assert 0 <= fell <= met
        held -= fell
        stages.append((stage, met, fell))
    return stages


def rounds(stages: list[tuple[Stage, int, int]]) -> list[tuple[int, int]]:
    """Rows and digs of every round."""
    return [(stage.rows, stage.digs) for stage, _, _ in stages if stage.digs]


# Openings


def test_openings():
    for norm in ("linf", "l2", "l1"):
        first = Cascade(PLAN, norm, True).next(100, 0)
        assert (first.name, first.rows, first.attack) == ("sprint", 100, Sprint(PLAN.opening, loss="log_odds"))
        blind = Cascade(PLAN, norm, False).next(100, 0)
        assert (blind.name, blind.rows) == ("square", 100)
        assert isinstance(blind.attack, Square)


def test_every_row_meets_the_opening_and_then_the_first_round():
    stages = play(Cascade(PLAN, "linf", True), 1000, lambda stage, met: 400 if stage.number == 1 else 0)
    assert [(stage.number, stage.name, stage.rows) for stage, _, _ in stages[:3]] == [
        (1, "sprint", 1000),
        (2, "round of 1", 600),
        (3, "round of 2", 300),
    ]


def test_an_unknown_profile_is_an_error():
    assert profile("quick").name == "quick"
    with pytest.raises(UsageError, match="unknown profile 'quik'; did you mean 'quick'"):
        profile("quik")


# Rounds


def test_a_round_that_breaks_few_is_followed_by_half_the_rows_and_twice_the_digs():
    stages = play(Cascade(PLAN, "linf", True), 1001)
    assert rounds(stages) == [(1001, 1), (501, 2), (251, 4), (126, 8), (63, 16)]
    assert stages[-1][0].digs == PLAN.deepest


@pytest.mark.parametrize("more", [0, 1])
def test_a_round_that_still_breaks_many_is_followed_by_as_many_rows(more):
    """More than an eighth of the round."""
    cascade = Cascade(PLAN, "linf", True)
    cascade.next(800, 0)
    first = cascade.next(800, 0)
    assert (first.rows, first.digs) == (800, 1)
    fell = int(STILL_FALLING * 800) + more
    second = cascade.next(800 - fell, fell)
    assert (second.rows, second.digs) == ((800 - fell, 1) if more else (400, 2))
    third = cascade.next(800 - fell, 0)
    assert (third.rows, third.digs) == ((350, 2) if more else (200, 4))


def test_tries_go_on_where_the_round_before_left_off():
    stages = [stage for stage, _, _ in play(Cascade(PROFILES["standard"], "l2", True), 500) if stage.digs]
    assert stages[0].tried == 0
    for before, after in pairwise(stages):
        assert after.tried == before.tried + before.tries > before.tried
    assert stages[-1].tries > stages[0].tries


def test_rows_that_fell_leave_no_work_behind_for_the_others():
    """Of 1000 rows 900 fall at once: the rest gets the work of few, not that of 1000."""
    stages = play(Cascade(PLAN, "linf", True), 1000, lambda stage, met: 900 if stage.digs and met > 900 else 0)
    assert rounds(stages) == [(1000, 1), (100, 1), (50, 2), (25, 4), (13, 8), (7, 16)]
    vain = 100 + sum(rows * digs for rows, digs in rounds(stages)[1:])
    assert vain <= PLAN.work * 2 * FEW


def test_longer_tries_are_fewer_and_without_gradients_there_are_none():
    def tries(norm: str, gradients: bool) -> dict[int, int]:
        return {stage.digs: stage.tries for stage, _, _ in play(Cascade(PLAN, norm, gradients), 200) if stage.digs}

    assert tries("linf", True) == {1: 1, 2: 1, 4: 1, 8: 3, 16: 6}
    assert tries("l2", True) == tries("l1", True) == {1: 1, 2: 1, 4: 1, 8: 1, 16: 3}
    assert set(tries("linf", False).values()) == {0}


def test_digs_go_to_chains_side_by_side_and_on_them_where_these_fill_the_model():
    cases = ((1, 1, 1), (2, 1, 2), (64, 3, 64), (2, FULL // 2, 1), (64, FULL // 64, 32), (1, FULL, 1))
    for digs, rows, chains in cases:
        stage = Stage(1, "round", rows, digs=digs)
        assert stage.chains == chains
        assert stage.chains * (digs // stage.chains) == digs


# Laws


def fates() -> list[Fate]:
    dice = random.Random(3)
    return [
        nobody,
        lambda stage, met: met,
        lambda stage, met: min(met, met // 8 + 1),
        lambda stage, met: dice.randint(0, met),
        lambda stage, met: dice.randint(0, met // 4),
    ]


@pytest.mark.parametrize("norm", ["linf", "l1"])
@pytest.mark.parametrize("plan", PROFILES.values(), ids=lambda plan: plan.name)
@pytest.mark.parametrize("held", [1, 2, 17, 63, 64, 65, 1000, 30_000])
def test_the_work_is_bounded_and_every_round_is_used(held, plan, norm):
    for fate in fates():
        cascade = Cascade(plan, norm, True)
        stages = play(cascade, held, fate)
        digs = rounds(stages)
        assert sum(rows * each for rows, each in digs) <= plan.work * max(cascade.first, FEW)
        assert all(each <= plan.deepest for _, each in digs)
        assert [stage.number for stage, _, _ in stages] == list(range(1, len(stages) + 1))
        if digs:
            assert digs[0] == (cascade.first, 1)
            assert cascade.first <= held
        left = held - sum(fell for _, _, fell in stages)
        assert digs or not left


@pytest.mark.parametrize("plan", PROFILES.values(), ids=lambda plan: plan.name)
def test_a_few_rows_that_hold_get_the_deepest_round(plan):
    """Of up to `FEW` rows each may cost more, so that the last ones meet all there is."""
    assert max(digs for _, digs in rounds(play(Cascade(plan, "linf", True), 2))) == plan.deepest


@pytest.mark.parametrize("stages", range(6))
def test_it_ends_when_nobody_holds(stages):
    cascade = Cascade(PLAN, "l2", True)
    for _ in range(stages):
        assert cascade.next(100, 0) is not None
    assert cascade.next(0, 100) is None


def test_the_same_numbers_give_the_same_stages():
    def once() -> list[tuple[Stage, int, int]]:
        dice = random.Random(5)
        return play(Cascade(PROFILES["standard"], "l2", True), 777, lambda _, met: dice.randint(0, met // 3))

    assert once() == once()


# Who is nearest


def test_nearest_takes_the_largest_gaps_and_of_equal_ones_the_lowest_ids():
    gap = torch.tensor([-1.0, -0.5, -0.5, -0.5, -2.0, -0.1])
    ids = torch.tensor([30, 22, 10, 21, 5, 40])
    for count, wanted in (
        (1, [40]),
        (2, [10, 40]),
        (3, [10, 21, 40]),
        (4, [10, 21, 22, 40]),
        (6, [5, 10, 21, 22, 30, 40]),
    ):
        assert ids[nearest(gap, ids, count)].tolist() == wanted
    assert nearest(gap, ids, 9).shape == (6,)
    assert nearest(gap[:0], ids[:0], 3).shape == (0,)


@pytest.mark.parametrize("seed", range(5))
def test_nearest_does_not_ask_in_which_order_rows_come(seed):
    draw = torch.Generator().manual_seed(seed)
    gap = -torch.randint(0, 6, (40,), generator=draw).float()  # many are equal
    ids = torch.randperm(1000, generator=draw)[:40]
    wanted = sorted(
        sorted(range(40), key=lambda row: (-float(gap[row]), int(ids[row])))[:15], key=lambda r: int(ids[r])
    )
    assert nearest(gap, ids, 15).tolist() == wanted
    order = torch.randperm(40, generator=draw)
    assert torch.equal(ids[order][nearest(gap[order], ids[order], 15)], ids[wanted])
