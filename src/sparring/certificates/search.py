"""The search of branch and bound.

Bounds are those of beta-CROWN (Wang et al. 2021, arXiv:2103.06624), the next split is chosen by filtered smart
branching, and the subproblems of all cases share batches: those first whose case seems nearest to its end, within a
case the worst first. Slopes and multipliers are sought in float32; what counts as a proof is computed in float64.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sparring.certificates.ascent import Ascent, climbed
from sparring.certificates.branching import choose
from sparring.certificates.breaking import descend, inside
from sparring.certificates.crown import crown
from sparring.certificates.frontier import Frontier, gathered
from sparring.certificates.graph import Graph
from sparring.certificates.ibp import Bounds
from sparring.certificates.region import Region
from sparring.certificates.rounding import logit_error, unit
from sparring.certificates.subproblem import (
    BETA,
    MIX,
    SLOPE,
    Frame,
    Leaves,
    Stem,
    cast,
    children,
    joined,
    sound,
    trimmed,
)
from sparring.certificates.vertices import finished
from sparring.core.batch import Rows
from sparring.engine.width import out_of_memory

OPEN, PROVED, BROKEN = 0, 1, 2
_LONG = 0.4  # seconds, for what cannot be stopped at a deadline
_FEW = 4  # steps, by which many bounds are high enough

Confirm = Callable[[Tensor, Tensor], Tensor]
Tell = Callable[["Decision"], None]
Found = tuple[Tensor, Bounds, Leaves]  # rows, what is known of their nodes, and their open subproblems


@dataclass(frozen=True)
class Question(Rows):
    """A row's property: everywhere in its region some asked_s . logits + offset_s is above zero.

    A margin is one of them (s = 1); s constraints `asked_s . logits + offset_s <= 0` of an unsafe set are s.
    """

    asked: Tensor  # (n, s, outputs) float64
    offset: Tensor  # (n, s) float64


@dataclass(frozen=True)
class Decision(Rows):
    """What became of each row."""

    state: Tensor  # (n,) int8: OPEN, PROVED or BROKEN
    lower: Tensor  # (n,) float64: proved of max_s (asked_s . logits + offset_s) less the model's own rounding
    point: Tensor  # (n, c, h, w) float64: that breaks the row, else where CROWN's least bound is attained
    nodes: Tensor  # (n,) int64: subproblems that were bounded
    seconds: float


@dataclass(frozen=True)
class Effort:
    """How hard to try: `climb` for children, `root` and its `deep` for the cases, and what a leaf costs."""

    climb: Ascent = field(default_factory=lambda: Ascent(steps=10, rate=0.3, decay=0.9))
    root: Ascent = field(default_factory=Ascent)
    candidates: int = 3
    tries: int = 2  # signed steps from the point of each bound
    first_tries: int = 15
    most: int = 2**13  # open subproblems of a case: one with more is given up
    in_all: int = 2**16
    roundoff: float | None = None  # of the arithmetic that a proof is to cover; None: what the model runs in


class Search:
    """One run of `decide`: what is known of every row and question by now."""

    def __init__(
        self,
        graph: Graph,
        region: Region,
        question: Question,
        home: Tensor,
        effort: Effort,
        width: int,
        deadline: float | None,
        confirm: Confirm | None,
        tell: Tell | None,
    ) -> None:
        self.graph, self.region, self.question, self.home = graph, region, question, home
        self.deadline, self.confirm, self.tell, self.effort, self.width = deadline, confirm, tell, effort, width
        self.began = time.monotonic()
        self.quick = cast(graph, torch.float32)
        n, device = len(region.x), region.x.device
        self.state = torch.zeros(n, dtype=torch.int8, device=device)
        self.point = region.x.clone()
        self.nodes = torch.zeros(n, dtype=torch.int64, device=device)
        self.proved = torch.full((n,), torch.inf, dtype=torch.float64, device=device)  # the least of what is closed
        self.floor = torch.full((n,), -torch.inf, dtype=torch.float64, device=device)  # and of what is open
        self.left = torch.ones_like(home)  # open subproblems of each question
        self.spared = question.offset.double()  # less the model's rounding, once that is known
        self.stuck: dict[int, float] = {}  # bounds of what cannot be split any further
        self.frontier = Frontier(effort.most, effort.in_all)

    def late(self) -> bool:
        """Is the time over?"""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def decision(self) -> Decision:
        """What is known by now."""
        lower = torch.where(self.state == PROVED, self.proved, torch.minimum(self.proved, self.floor))
        return Decision(self.state, lower, self.point, self.nodes, time.monotonic() - self.began)

    def run(self, known: Bounds | None) -> Decision:
        """CROWN's bounds for all, deeper ones for who is left, then branching."""
        everyone = torch.arange(len(self.state), device=self.home.device)
        first = self._in_parts(everyone, self.width, self._first, known)
        if not first:
            return self.decision()
        rows, bounds, leaves = _together(first)
        order = self.floor[rows].argsort(descending=True)
        deep = self._in_parts(order, self.width, self._deepen, (rows, bounds, leaves))
        if not deep:
            return self.decision()
        rows, bounds, leaves = _together(deep)
        if len(rows):
            stem = self._stem(rows, bounds)
            leaves = replace(leaves, slope=_wider(leaves.slope, stem.free.shape[1]))
            self.frontier.push(self.home[leaves.question].tolist(), leaves)
            while len(self.frontier) and not self.late():
                self._branch(stem)
                self._report()
        return self.decision()

    def _in_parts(self, ids: Tensor, width: int, run: Callable[[Tensor, Any], Found], given: Any) -> list[Found]:
        """`run` on at most `width` of `ids` at a time until it is late: as many as take about half a second."""
        found: list[Found] = []
        size = max(1, width // 16)
        while len(ids) and not self.late():
            began, before = time.monotonic(), self._kept()
            try:
                found.append(run(ids[:size], given))
            except RuntimeError as error:
                if size == 1 or not out_of_memory(error):
                    raise
                self.left, self.proved, self.nodes = before
                width = size = size // 2
                continue
            ids = ids[size:]
            slow = time.monotonic() - began > _LONG
            size = max(1, size // 2) if slow else min(width, 2 * size)
            self._report()
        return found

    def _kept(self) -> tuple[Tensor, Tensor, Tensor]:
        """What must be as before if a part is done again: else its subproblems would count twice."""
        return self.left, self.proved, self.nodes

    def _report(self) -> None:
        if self.tell is not None:
            self.tell(self.decision())

    def _stem(self, rows: Tensor, bounds: Bounds) -> Stem:
        """What the subproblems of `rows` share."""
        place = torch.full_like(self.state, -1, dtype=torch.int64)
        place = place.index_copy(0, rows, torch.arange(len(rows), device=rows.device))
        return Stem(self.graph, self.region.take(rows), bounds, self.question.asked, self.spared, place[self.home])

    def _first(self, rows: Tensor, known: Bounds | None) -> Found:
        """CROWN's bounds of `rows`, and a quick search from where they are attained."""
        here = self.region.take(rows)
        bounds = crown(self.graph, here).bounds if known is None else _rows_of(known, rows)
        roundoff = unit(rows.device) if self.effort.roundoff is None else self.effort.roundoff
        error = logit_error(self.graph, bounds, roundoff)
        stem = self._stem(rows, bounds)
        questions = (stem.home >= 0).nonzero().squeeze(1)
        guard = (self.question.asked[questions].abs() @ error[stem.home[questions]].unsqueeze(2)).squeeze(2)
        self.spared = self.spared.index_copy(0, questions, self.question.offset[questions] - guard)
        stem = self._stem(rows, bounds)
        frame = Frame(stem, stem.roots(questions))
        value, points = frame.alone()
        best = value.argmax(1)
        mix = torch.nn.functional.one_hot(best, value.shape[1]).double()
        leaves = replace(frame.leaves, lower=value.amax(1), mix=mix)
        self._note(rows, leaves)
        weakest = (leaves.lower == self.floor[self.home[questions]]).nonzero().squeeze(1)
        self.point = self.point.index_copy(0, self.home[questions[weakest]], points[weakest, best[weakest]])
        leaves = self._closed(leaves, points[torch.arange(len(best)), best], self.effort.first_tries)
        return self._found(rows, bounds, leaves)

    def _deepen(self, order: Tensor, given: Found) -> Found:
        """Climbed bounds of the rows at `order`, and a climb of their questions."""
        rows, bounds, leaves = given[0][order], _rows_of(given[1], order), given[2]
        if self.effort.root.deep:
            bounds = crown(self.graph, self.region.take(rows), known=bounds, ascent=self.effort.root).bounds
        stem = self._stem(rows, bounds)
        mine = leaves.take((stem.home[leaves.question] >= 0).nonzero().squeeze(1))
        roots = replace(stem.roots(mine.question), lower=mine.lower, mix=mine.mix)
        found, points = self._climb(stem, roots, self.effort.root)
        self._note(rows, found)
        return self._found(rows, bounds, self._closed(found, points, self.effort.first_tries))

    def _note(self, rows: Tensor, leaves: Leaves) -> None:
        """The worst bounds of `rows` are those of `leaves`, which are all that they have open."""
        floor = torch.full_like(self.floor, torch.inf)
        floor = floor.scatter_reduce(0, self.home[leaves.question], leaves.lower, "amin")
        self.floor = self.floor.index_copy(0, rows, floor[rows])

    def _found(self, rows: Tensor, bounds: Bounds, leaves: Leaves) -> Found:
        """Those of `rows` that are open still, with their `bounds` and `leaves`."""
        place = (self.state[rows] == OPEN).nonzero().squeeze(1)
        return rows[place], _rows_of(bounds, place), leaves

    def _climb(self, stem: Stem, leaves: Leaves, ascent: Ascent) -> tuple[Leaves, Tensor]:
        """`leaves` and the points of their bounds after a climb: a few steps for all, the rest for who needs them."""
        few = min(ascent.steps, _FEW)
        found, points = self._ascend(stem, leaves, ascent, few)
        rest = (found.lower <= 0).nonzero().squeeze(1)
        if few == ascent.steps or not len(rest) or self.late():
            return found, points
        again, there = self._ascend(stem, found.take(rest), ascent, ascent.steps - few)
        return found.put(rest, again), points.index_copy(0, rest, there)

    def _ascend(self, stem: Stem, leaves: Leaves, ascent: Ascent, steps: int) -> tuple[Leaves, Tensor]:
        """`leaves` with what was found best in float32 and the bounds that it gives in float64; and their points."""
        frame = Frame(stem, leaves, self.quick, torch.float32)

        def enough(lower: Tensor) -> Tensor:
            return lower > (-torch.inf if self.late() else 0.0)

        *_, found = climbed(frame.bound, frame.variables(), ascent, steps, enough, fit=sound, keep=True)
        found = {key: values.squeeze(1) for key, values in found.items()}
        mix = sound(MIX, found[MIX].double()) if MIX in found else leaves.mix
        leaves = replace(leaves, slope=found.get(SLOPE, leaves.slope), beta=found.get(BETA, leaves.beta), mix=mix)
        exact = Frame(stem, leaves)
        value, points = exact.bound(exact.variables())
        return replace(leaves, lower=torch.maximum(leaves.lower, value.squeeze(1))), points.squeeze(1)

    def _closed(self, leaves: Leaves, points: Tensor, tries: int) -> Leaves:
        """Those of `leaves` that stay open after their bounds and a search from their `points` are heard."""
        case = self.home[leaves.question]
        self.nodes = self.nodes.index_add(0, case, torch.ones_like(case))
        done = leaves.lower > 0
        self.proved = self.proved.scatter_reduce(0, case[done], leaves.lower[done], "amin")
        self.left = self.left.index_add(0, leaves.question[done], -torch.ones_like(case[done]))
        rest = (~done & (self.state[case] == OPEN)).nonzero().squeeze(1)
        if len(rest):
            self._search(leaves.question[rest], points[rest], tries)
        waiting = torch.zeros_like(self.nodes).index_add(0, self.home, self.left)
        self.state = torch.where((waiting == 0) & (self.state == OPEN), PROVED, self.state)
        return leaves.take(rest[self.state[case[rest]] == OPEN])

    def _search(self, question: Tensor, points: Tensor, tries: int) -> None:
        """Look for unsafe points near `points`, one for each of the questions."""
        case = self.home[question]
        here, asked, offset = self.region.take(case), self.question.asked[question], self.question.offset[question]
        near, value = descend(
            self.quick, here.to(torch.float32), asked.float(), offset.float(), points.float(), tries, self.late
        )
        hit = (value <= 0).nonzero().squeeze(1)
        if not len(hit):
            return
        near = inside(here.take(hit), near[hit].double())
        said = torch.einsum("nk,nsk->ns", self.graph.forward(near), asked[hit]) + offset[hit]
        good = (said <= 0).all(1)
        good = good if self.confirm is None else good & self.confirm(near, case[hit])
        self.state = self.state.index_fill(0, case[hit[good]], BROKEN)
        self.point = self.point.index_copy(0, case[hit[good]], near[good])

    def _branch(self, stem: Stem) -> None:
        """Split some subproblems and bound both halves."""
        taken, before = self.frontier.pop(max(1, self.width // 2)), self._kept()
        try:
            leaves = self._halves(stem, gathered(taken).to(self.home.device))
        except RuntimeError as error:
            if self.width <= 2 or not out_of_memory(error):
                raise
            self.width //= 2
            self.left, self.proved, self.nodes = before
            self.frontier.push([case for case, _ in taken], gathered(taken))
            return
        self.frontier.push(self.home[leaves.question].tolist(), leaves)
        for case in {case for case, _ in taken}:
            if self.state[case] == OPEN:
                self._sink(case)
            if self.state[case] != OPEN or case in self.stuck:
                self.frontier.drop(case)
        while (crowded := self.frontier.crowded()) is not None:
            self._sink(crowded)
            self.frontier.drop(crowded)

    def _sink(self, case: int) -> None:
        """Note the worst open bound of `case`."""
        left = [lower for lower in (self.frontier.lowest(case), self.stuck.get(case)) if lower is not None]
        if left:
            self.floor = self.floor.index_fill(0, torch.tensor([case], device=self.floor.device), min(left))

    def _halves(self, stem: Stem, parents: Leaves) -> Leaves:
        """The halves of `parents` that stay open."""
        choice = choose(stem, parents, self.quick, torch.float32, self.effort.candidates)
        if bool((last := choice.at < 0).any()):
            self._finish(stem, parents.take(last.nonzero().squeeze(1)))
            rest = (~last).nonzero().squeeze(1)
            parents, choice = parents.take(rest), choice.take(rest)
            if not len(rest):
                return parents
        halves = children(parents, choice.at, choice.scale)
        self.left = self.left.index_add(0, parents.question, torch.ones_like(parents.question))
        found, points = self._climb(stem, halves, self.effort.climb)
        risen = (found.lower.clamp_max(0.0) - halves.lower).tolist()
        for case, gain in zip(self.home[found.question].tolist(), risen, strict=True):
            self.frontier.saw(case, gain, 1)
        return self._closed(found, points, self.effort.tries)

    def _finish(self, stem: Stem, leaves: Leaves) -> None:
        """`leaves` in which no ReLU is left to split: they are decided exactly, or their cases are given up."""
        for i in range(len(leaves.question)):
            leaf = trimmed(leaves.take(torch.tensor([i], device=leaves.question.device)))
            case = int(self.home[leaf.question])
            found = None if self.late() else finished(stem, leaf)
            if found is not None and not len(self._closed(*found, self.effort.first_tries).question):
                continue
            lower = float((leaf if found is None else found[0]).lower)
            self.stuck[case] = min(lower, self.stuck.get(case, torch.inf))


def _rows_of(bounds: Bounds, rows: Tensor) -> Bounds:
    return {at: (low[rows], high[rows]) for at, (low, high) in bounds.items()}


def _together(parts: list[Found]) -> Found:
    """All `parts` in one."""

    def whole(at: int, end: int) -> Tensor:
        return torch.cat([part[1][at][end] for part in parts])

    bounds = {at: (whole(at, 0), whole(at, 1)) for at in parts[0][1]}
    slopes = max(part[2].slope.shape[1] for part in parts)
    leaves = [replace(part[2], slope=_wider(part[2].slope, slopes)) for part in parts]
    return torch.cat([part[0] for part in parts]), bounds, joined(leaves)


def _wider(values: Tensor, size: int) -> Tensor:
    """(m, size) `values`, cut or padded: those beyond the unstable ReLUs of a row mean nothing."""
    return torch.nn.functional.pad(values, (0, size - values.shape[1]))
