"""The open subproblems of all cases, and which of them to look at next."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence

import torch

from sparring.certificates.subproblem import Leaves, joined

_FAR = 60.0  # a tree of 2^60 is as good as any larger one


class Frontier:
    """A heap of subproblems for each case, the worst bound first.

    Cases with the least work ahead come first, so that a time limit buys most of them: a bound of -v that rises by
    g with each split stands for 2^(v / g) subproblems.
    """

    def __init__(self, most: int, in_all: int) -> None:
        self.most, self.in_all = most, in_all
        self._heaps: dict[int, list[tuple[float, int, Leaves]]] = {}
        self._work: dict[int, float] = {}
        self._risen: dict[int, tuple[float, int]] = {}
        self._serial = itertools.count()

    def __len__(self) -> int:
        return sum(len(heap) for heap in self._heaps.values())

    def push(self, cases: Sequence[int], leaves: Leaves) -> None:
        """Add `leaves` of `cases`, one each."""
        leaves = leaves.to(torch.device("cpu"))  # the device has better uses for its memory
        for i, (case, lower) in enumerate(zip(cases, leaves.lower.tolist(), strict=True)):
            one = leaves.take(torch.tensor([i]))
            heapq.heappush(self._heaps.setdefault(case, []), (lower, next(self._serial), one))
        for case in set(cases):
            self._work[case] = self._ahead(case)

    def saw(self, case: int, risen: float, splits: int) -> None:
        """Bounds of `case` rose by `risen` in all with `splits`."""
        before = self._risen.get(case, (0.0, 0))
        self._risen[case] = (before[0] + risen, before[1] + splits)

    def pop(self, count: int) -> list[tuple[int, Leaves]]:
        """At most `count` subproblems with their cases; they are no longer here."""
        found: list[tuple[int, Leaves]] = []
        for case in sorted(self._heaps, key=lambda case: self._work[case]):
            heap = self._heaps[case]
            while heap and len(found) < count:
                found.append((case, heapq.heappop(heap)[2]))
            if not heap:
                del self._heaps[case]
            if len(found) == count:
                break
        return found

    def lowest(self, case: int) -> float | None:
        """The worst bound of `case`; None if nothing is open."""
        heap = self._heaps.get(case)
        return heap[0][0] if heap else None

    def drop(self, case: int) -> None:
        """Forget the subproblems of `case`."""
        self._heaps.pop(case, None)

    def crowded(self) -> int | None:
        """A case to give up: one that has too many subproblems, or the one with most work ahead if all have."""
        for case, heap in self._heaps.items():
            if len(heap) > self.most:
                return case
        if len(self) <= self.in_all:
            return None
        return max(self._heaps, key=lambda case: self._work[case])

    def _ahead(self, case: int) -> float:
        """How many subproblems `case` seems to need."""
        risen, splits = self._risen.get(case, (0.0, 0))
        if not splits:
            risen = sum(rise for rise, _ in self._risen.values()) or 1.0
            splits = sum(count for _, count in self._risen.values()) or 1
        step = max(risen / splits, 1e-12)
        return math.fsum(math.exp2(min(-lower / step, _FAR)) for lower, _, _ in self._heaps[case])


def gathered(found: Sequence[tuple[int, Leaves]]) -> Leaves:
    """The subproblems of a `pop` as one."""
    return joined([leaves for _, leaves in found])
