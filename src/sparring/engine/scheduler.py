"""Who sits where: continuous batching over cases, in plain integers.

A case is (row, rank): a row of the data and one of its tries (restart x target). Cases take seats in the
order of their rank, so every row has its first try before any has its second. A success at rank r cancels
the row's cases of higher rank, seated or waiting; those of lower rank go on, and the lowest rank that
succeeds is the one that counts: so the outcome does not depend on how many seats there are.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple


class Case(NamedTuple):
    """One try at one row."""

    row: int
    rank: int


class Scheduler:
    """Seats for cases."""

    def __init__(self, rows: int, ranks: int, seats: int) -> None:
        self._rows, self._end, self._next = rows, rows * ranks, 0
        self._again: deque[Case] = deque()  # unseated cases, before all new ones
        self._free = list(range(seats - 1, -1, -1))
        self._limit = [ranks] * rows  # ranks from here on are cancelled
        self._sitting: list[set[int]] = [set() for _ in range(rows)]
        self._ended: list[set[int]] = [set() for _ in range(rows)]  # ranks that had their turn
        self._closed = [False] * rows
        self.settled = 0  # rows whose verdict can no longer change
        self.seated: dict[int, Case] = {}

    @property
    def waiting(self) -> bool:
        """May there be cases without a seat?"""
        return bool(self._again) or self._next < self._end

    def _draw(self) -> Case | None:
        while self.waiting:
            if self._again:
                case = self._again.popleft()
            else:
                rank, row = divmod(self._next, self._rows)
                case, self._next = Case(row, rank), self._next + 1
            if case.rank < self._limit[case.row]:
                return case
        return None

    def refill(self) -> dict[int, Case]:
        """Fill the free seats; returns who came."""
        came: dict[int, Case] = {}
        while self._free and (case := self._draw()):
            seat = self._free.pop()
            came[seat] = self.seated[seat] = case
            self._sitting[case.row].add(seat)
        return came

    def leave(self, seat: int) -> None:
        """The case in `seat` is over."""
        case = self.seated.pop(seat)
        self._sitting[case.row].remove(seat)
        self._free.append(seat)
        self._ended[case.row].add(case.rank)
        if not self._closed[case.row] and all(r in self._ended[case.row] for r in range(self._limit[case.row])):
            self._closed[case.row] = True
            self.settled += 1

    def succeed(self, seat: int) -> None:
        """The case in `seat` broke its row: it leaves, and so do the row's cases of higher rank."""
        row, rank = self.seated[seat]
        self._limit[row] = min(self._limit[row], rank)
        for other in [s for s in self._sitting[row] if self.seated[s].rank >= rank]:
            self.leave(other)

    def expel(self, seat: int) -> None:
        """The row in `seat` cannot go on: all of its cases are over."""
        row = self.seated[seat].row
        self._limit[row] = 0
        for other in list(self._sitting[row]):
            self.leave(other)

    @property
    def unsettled(self) -> list[int]:
        """Rows whose verdict may still change."""
        return [row for row, closed in enumerate(self._closed) if not closed]

    def compact(self, seats: int) -> list[int]:
        """Move everybody to the first `seats` seats; returns the old seat of each new one taken."""
        old = sorted(self.seated)
        self.seated = {new: self.seated[seat] for new, seat in enumerate(old)}
        self._free = list(range(seats - 1, len(old) - 1, -1))
        self._sitting = [set() for _ in range(self._rows)]
        for seat, case in self.seated.items():
            self._sitting[case.row].add(seat)
        return old

    def start_over(self, seats: int) -> None:
        """Send everybody back to the head of the queue, with `seats` seats from now on."""
        self._again.extendleft(self.seated[seat] for seat in sorted(self.seated, reverse=True))
        self.seated, self._sitting = {}, [set() for _ in range(self._rows)]
        self._free = list(range(seats - 1, -1, -1))
