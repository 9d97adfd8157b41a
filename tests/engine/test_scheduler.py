"""The scheduler, against random lives of cases."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sparring.engine.scheduler import Case, Scheduler

Fate = tuple[int, bool]  # turns until the case is over, and whether it then succeeds


def live(
    fates: dict[Case, Fate], rows: int, ranks: int, seats: int, compact: bool = False
) -> tuple[dict[int, int], list[Case]]:
    """Play all cases out; returns the lowest rank that succeeded in each row, and who was seated."""
    scheduler, left, won, seen = Scheduler(rows, ranks, seats), {}, {}, []
    while True:
        came = scheduler.refill()
        assert set(came.values()).isdisjoint(left)
        for case in came.values():
            left[case] = fates[case][0]
            seen.append(case)
        assert len(scheduler.seated) <= seats
        if not scheduler.seated:
            assert not scheduler.waiting
            assert scheduler.settled == rows
            return won, seen
        if compact and not scheduler.waiting:
            before = dict(scheduler.seated)
            old = scheduler.compact(len(before))
            assert [before[seat] for seat in old] == [scheduler.seated[k] for k in range(len(before))]
        for seat, case in list(scheduler.seated.items()):
            if scheduler.seated.get(seat) != case:
                continue
            left[case] -= 1
            if left[case] > 0:
                continue
            if fates[case][1]:
                won[case.row] = min(case.rank, won.get(case.row, case.rank))
                scheduler.succeed(seat)
                assert all(c.row != case.row or c.rank < case.rank for c in scheduler.seated.values())
            else:
                scheduler.leave(seat)


@st.composite
def lives(draw: st.DrawFn) -> tuple[dict[Case, Fate], int, int]:
    rows, ranks = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    fate = st.tuples(st.integers(1, 5), st.booleans())
    return {Case(r, k): draw(fate) for r in range(rows) for k in range(ranks)}, rows, ranks


@settings(max_examples=200, deadline=None)
@given(lives(), st.integers(1, 25), st.booleans())
def test_the_lowest_success_counts_whatever_the_seats(life, seats, compact):
    fates, rows, ranks = life
    won, seen = live(fates, rows, ranks, seats, compact)
    lowest = {
        row: rank
        for row in range(rows)
        for rank in [next((k for k in range(ranks) if fates[Case(row, k)][1]), None)]
        if rank is not None
    }
    assert won == lowest
    assert len(seen) == len(set(seen))  # nobody twice
    must = {case for case in fates if case.rank <= lowest.get(case.row, ranks)}
    assert must <= set(seen)  # nobody forgotten
    if seats == 1:
        assert must == set(seen)  # and nobody needlessly


def test_first_tries_come_before_second_ones():
    _, seen = live({Case(r, k): (1, False) for r in range(3) for k in range(2)}, 3, 2, 2)
    assert [case.rank for case in seen] == [0, 0, 0, 1, 1, 1]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(2, 12), st.integers(0, 5))
def test_starting_over_seats_everybody_again_and_first(rows, ranks, seats, done):
    scheduler = Scheduler(rows, ranks, seats)
    scheduler.refill()
    over = [scheduler.seated[seat] for seat in list(scheduler.seated)[:done]]
    for seat in list(scheduler.seated)[:done]:
        scheduler.leave(seat)
    sitting = [scheduler.seated[seat] for seat in sorted(scheduler.seated)]
    half = max(1, seats // 2)
    scheduler.start_over(half)
    assert not scheduler.seated
    again = []
    while came := scheduler.refill():
        assert len(scheduler.seated) <= half
        again += came.values()
        for seat in came:
            scheduler.leave(seat)
    assert again[: len(sitting)] == sitting
    assert sorted(again + over) == sorted(Case(r, k) for r in range(rows) for k in range(ranks))


def test_cancelled_cases_stay_cancelled_after_starting_over():
    scheduler = Scheduler(1, 3, 2)
    scheduler.refill()
    scheduler.succeed(next(seat for seat, case in scheduler.seated.items() if case.rank == 1))
    scheduler.start_over(2)
    assert list(scheduler.refill().values()) == [Case(0, 0)]
