"""Is there a point that a property forbids? Searched for, and ruled out, within a time limit.

In this order: a quick descent, CROWN, a longer descent, and branch and bound: over the inputs of networks that have
few of them, else over the ReLUs, where alpha-CROWN comes first. A counterexample lies in the box and meets every
constraint, without any tolerance, as ONNX Runtime runs the network. A proof speaks of the network over the real
numbers, as the competition does, and of inputs that are rounded to float32.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from sparring.certificates import branch
from sparring.certificates.branch import PROVED, Question
from sparring.certificates.crown import Relaxation, crown
from sparring.certificates.falsify import falsify
from sparring.certificates.graph import Graph, OutOfTime, trace
from sparring.certificates.operators import Interval
from sparring.certificates.pulling import pull
from sparring.certificates.region import Region
from sparring.certificates.splitting import guards, split_inputs
from sparring.certificates.vnnlib import Case, Property
from sparring.core.errors import UsageError
from sparring.core.model import Model

SAT, UNSAT, UNKNOWN, TIMEOUT = "sat", "unsat", "unknown", "timeout"
_EXACT = 2.0**-53  # the proof's own arithmetic is all that it must cover
_FEW = 12  # inputs that are not fixed: up to here, their boxes are split


class Network(Model, Protocol):
    """A function of (n, *shape) that answers (n, outputs)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one row."""
        ...

    @property
    def inputs(self) -> int:
        """How many numbers a row has."""
        ...

    @property
    def outputs(self) -> int:
        """How many numbers it answers."""
        ...

    def run(self, x: Tensor) -> Tensor:
        """(n, outputs) float64: what it answers for `x` (n, *shape) where it is used in earnest."""
        ...


@dataclass(frozen=True)
class Answer:
    """`sat` with a point and its outputs, `unsat`, or `unknown` or `timeout`."""

    verdict: str
    by: str  # what found it
    seconds: float
    nodes: int = 0  # of branch and bound
    point: Tensor | None = None  # (inputs,) float64
    outputs: Tensor | None = None  # (outputs,) float64


class _Found(Exception):
    """A counterexample: it settles the whole property, wherever it comes up."""

    def __init__(self, point: Tensor, outputs: Tensor) -> None:
        super().__init__("found")
        self.point, self.outputs = point, outputs


def verify(network: Network, prop: Property, *, timeout: float | None = None) -> Answer:
    """Whether `network` has a point that `prop` forbids, within `timeout` seconds."""
    started = time.monotonic()
    for what, asked, has in (("inputs", prop.inputs, network.inputs), ("outputs", prop.outputs, network.outputs)):
        if asked != has:
            raise UsageError(f"expected a property of {has} {what}, as the network has, got one of {asked}")
    search = _Search(network, prop, None if timeout is None else started + timeout)
    try:
        verdict = search.run()
    except _Found as found:
        point, outputs = found.point.flatten(), found.outputs
        return Answer(SAT, search.by, time.monotonic() - started, search.nodes, point, outputs)
    except OutOfTime:
        verdict = TIMEOUT
    return Answer(verdict, search.by, time.monotonic() - started, search.nodes)


class _Search:
    """One property on its way through the methods."""

    def __init__(self, network: Network, prop: Property, deadline: float | None) -> None:
        self.network, self.cases, self.deadline = network, prop.cases, deadline
        self.by, self.nodes = "empty", 0
        self.home = torch.tensor([at for at, case in enumerate(prop.cases) for _ in case.unsafe], dtype=torch.int64)

    def run(self) -> str:
        """The verdict, unless `_Found` is raised."""
        if not self.cases:
            return UNSAT
        traced = replace(trace(self.network, self.network.shape), pause=self._pause)
        graph, rough = traced.graph(), traced.graph(torch.float32)
        question, boxes = _questions(self.cases), _region(self.cases, self.network.shape)
        free = int((boxes.high > boxes.low).flatten(1).sum(1).max())
        rows = torch.arange(len(self.home))
        self._descend(rough, boxes, question, rows, 5, 20, 0)
        known: dict[int, Relaxation] = {}
        rows = self._bound(graph, boxes, question, known)
        self._descend(rough, boxes, question, rows, 50, 50, 1)
        if not len(rows):
            return UNSAT
        proved = not self._late() and self._branch(graph, boxes, question, known, rows, free)
        return UNSAT if proved else TIMEOUT if self._late() else UNKNOWN

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def _pause(self) -> None:
        if self._late():
            raise OutOfTime

    def _tell(self, so_far: branch.Decision) -> None:
        self.nodes = int(so_far.nodes.sum())

    def _confirm(self, points: Tensor, cases: Tensor) -> Tensor:
        """(m,) False for `points` (m, *shape) that are not unsafe in their `cases` (m,); `_Found` by one that is."""
        for point, at in zip(points.double(), cases.tolist(), strict=True):
            case = self.cases[at]
            inside = torch.clamp(point.flatten(), case.low, case.high).view(self.network.shape)
            outputs = self.network.run(inside[None])[0]
            if any(bool((unsafe.a @ outputs + unsafe.b <= 0).all()) for unsafe in case.unsafe):
                raise _Found(inside, outputs)
        return torch.zeros(len(points), dtype=torch.bool)

    def _descend(
        self, graph: Graph, boxes: Region, question: Question, rows: Tensor, starts: int, steps: int, seed: int
    ) -> None:
        if not len(rows) or self._late():
            return
        self.by = "descent"
        falsify(
            graph,
            boxes.take(self.home[rows]),
            question.take(rows),
            starts=starts,
            steps=steps,
            deadline=self.deadline,
            confirm=lambda points, some: self._confirm(points, self.home[rows[some]]),
            seed=seed,
        )

    def _bound(self, graph: Graph, boxes: Region, question: Question, known: dict[int, Relaxation]) -> Tensor:
        """(m,) the rows that CROWN leaves open; `known` takes what it finds of their cases."""
        self.by, left = "crown", []
        for at in range(len(self.cases)):
            rows = (self.home == at).nonzero().squeeze(1)
            if self._late():
                left.append(rows)
                continue
            where = boxes.take(torch.tensor([at]))
            relaxed = crown(graph, where)
            asked = question.asked[rows].flatten(0, 1)[None]
            value, _ = pull(graph, len(graph.nodes) - 1, asked, relaxed.lines, where)
            open_ = rows[~_proved(value, graph, relaxed, question.take(rows))]
            if len(open_):
                known[at] = relaxed
            left.append(open_)
        return torch.cat(left)

    def _branch(
        self,
        graph: Graph,
        boxes: Region,
        question: Question,
        known: dict[int, Relaxation],
        rows: Tensor,
        free: int,
    ) -> bool:
        """Does branch and bound prove all of `rows`?"""
        asked, home = question.take(rows), self.home[rows]
        if free <= _FEW:
            self.by = "input splitting"
            found = split_inputs(
                graph,
                boxes.take(home),
                asked,
                deadline=self.deadline,
                confirm=lambda x, at: self._confirm(x, home[at]),
                roundoff=_EXACT,
            )
        else:
            self.by = "branch and bound"
            cases = torch.tensor(sorted(set(home.tolist())), dtype=torch.int64)
            held = [known[at].bounds for at in cases.tolist() if at in known]
            bounds = {at: _joined([one[at] for one in held]) for at in range(len(graph.nodes))}
            found = branch.decide(
                graph,
                boxes.take(cases),
                asked,
                deadline=self.deadline,
                known=bounds if len(held) == len(cases) else None,
                confirm=lambda x, at: self._confirm(x, cases[at]),
                tell=self._tell,
                home=torch.searchsorted(cases, home),
                effort=branch.Effort(roundoff=_EXACT),
            )
        self.nodes = int(found.nodes.sum())
        return bool((found.state == PROVED).all())


def _joined(parts: list[Interval]) -> Interval:
    low, high = (torch.cat([part[end] for part in parts]) for end in (0, 1))
    return low, high


def _proved(value: Tensor, graph: Graph, relaxed: Relaxation, question: Question) -> Tensor:
    """(q,) whether bounds (1, q * s) of the asked parts of `question`, of one case, prove it."""
    spare = guards(graph, relaxed.bounds, question, _EXACT)
    return (value.view_as(question.offset) + question.offset > spare).any(1)


def _questions(cases: tuple[Case, ...]) -> Question:
    """A row for each conjunction of each case; the last constraint is said again where others have more."""
    every = [unsafe for case in cases for unsafe in case.unsafe]
    most = max(len(unsafe.b) for unsafe in every)
    index = [torch.arange(most).clamp_max(len(unsafe.b) - 1) for unsafe in every]
    pairs = list(zip(every, index, strict=True))
    return Question(torch.stack([u.a[i] for u, i in pairs]), torch.stack([u.b[i] for u, i in pairs]))


def _region(cases: tuple[Case, ...], shape: tuple[int, ...]) -> Region:
    """The boxes of `cases`, with all that their points are rounded to in float32."""
    low, high = torch.stack([case.low for case in cases]), torch.stack([case.high for case in cases])
    low, high = torch.minimum(low, low.float().double()), torch.maximum(high, high.float().double())
    low, high = low.view(-1, *shape), high.view(-1, *shape)
    return Region((low + high) / 2, low, high)
