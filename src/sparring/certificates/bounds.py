"""Lower bounds of every margin of a model over a threat model: the front door of this package.

All is computed in float64. A bound is a proof when it is above its guard, which covers what the model rounds in its
own arithmetic (see `rounding`; the roundings made here are 2^29 times smaller, and inside it). The input set is that
of the judge, slack included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.certificates.alpha import ascend
from sparring.certificates.ascent import Ascent
from sparring.certificates.crown import Relaxation, crown, crown_ibp, interval_lines, lower_bounds, margins
from sparring.certificates.graph import Graph, Trace, trace
from sparring.certificates.linear import check_linear
from sparring.certificates.peeling import peel
from sparring.certificates.region import Region, region
from sparring.certificates.rounding import guard, unit
from sparring.core.batch import Rows
from sparring.core.errors import UsageError, unknown
from sparring.core.model import Model
from sparring.core.threat import Threat
from sparring.engine.preflight import check_images, check_labels
from sparring.engine.width import out_of_memory

METHODS = ("linear", "ibp", "crown-ibp", "crown", "alpha-crown")


@dataclass(frozen=True)
class Bounds(Rows):
    """What is proved of each row: the logit of its label is above each other one by at least this, everywhere."""

    lower: Tensor  # (n, classes - 1) float64: of the exact margins, the other classes in order
    guard: Tensor  # (n, classes - 1) float64: how much of that the model's own rounding can eat up
    worst: Tensor  # (n, c, h, w): where the lowest bound is attained: a point of the set, and one to attack from

    @property
    def certified(self) -> Tensor:
        """(n,) bool: no image of the threat model changes the label."""
        return (self.lower > self.guard).all(1)


def bounds(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    method: str = "crown",
    *,
    ascent: Ascent | None = None,
    traced: Trace | None = None,
    width: int = 64,
) -> Bounds:
    """What `method` proves of images `x` (n, c, h, w) with labels `y` (n,) in `threat` (linf or l2).

    `method` is linear (exact, for linear models), ibp, crown-ibp, crown, or alpha-crown with its `ascent`. Rows go
    `width` at a time, and fewer where memory runs out. `traced` spares the trace of the model.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    check_images(x, model.bounds)
    if threat.bounds != model.bounds:
        raise UsageError(f"expected a threat model with the model's bounds {model.bounds}, got {threat.bounds}")
    with torch.no_grad():
        graph = (traced or trace(model, x.shape[1:], x.device)).graph()
        check_labels(y, len(x), classes=graph.classes)
        peeled = peel(graph, region(threat, x))
        found = _joined(_narrowing(peeled.graph, peeled.region, y, method, ascent or Ascent(), width))
        worst = peeled.images(found.worst, torch.arange(len(y), device=y.device))
        return dataclasses.replace(found, worst=threat.project(worst.to(x.dtype), x))


def _narrowing(graph: Graph, where: Region, y: Tensor, method: str, ascent: Ascent, width: int) -> list[Bounds]:
    """`_prove` in chunks of `width` rows, of half as many where memory runs out."""
    found: list[Bounds] = []
    start = 0
    while start < len(y):
        rows = torch.arange(start, min(start + width, len(y)), device=y.device)
        try:
            found.append(_prove(graph, where.take(rows), y[rows], method, ascent))
        except RuntimeError as error:
            if width == 1 or not out_of_memory(error):
                raise
            width //= 2
            continue
        start += len(rows)
    return found


def _joined(parts: Sequence[Bounds]) -> Bounds:
    names = [field.name for field in dataclasses.fields(Bounds)]
    return Bounds(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def _prove(graph: Graph, where: Region, y: Tensor, method: str, ascent: Ascent) -> Bounds:
    if method == "linear":
        check_linear(graph)
    relaxed = crown_ibp(graph, where) if method in ("linear", "ibp", "crown-ibp") else crown(graph, where)
    found = _asked(graph, where, y, relaxed, interval=method == "ibp")
    if method == "crown-ibp":  # neither the interval's nor the linear bound of a margin is always the better
        found = _better(found, _asked(graph, where, y, relaxed, interval=True))
    if method != "alpha-crown":
        return found
    found = _climb(graph, where, y, found, relaxed, ascent)
    rows = _undecided(graph, where, y, found)
    if not ascent.deep or not len(rows):
        return found
    here, known = where.take(rows), {at: (low[rows], high[rows]) for at, (low, high) in relaxed.bounds.items()}
    deeper = crown(graph, here, known=known, ascent=ascent)
    again = _better(_asked(graph, here, y[rows], deeper), found.take(rows))
    return found.put(rows, _climb(graph, here, y[rows], again, deeper, ascent))


def _asked(graph: Graph, where: Region, y: Tensor, relaxed: Relaxation, *, interval: bool = False) -> Bounds:
    """What the lines of `relaxed` say, or with `interval` its intervals."""
    lines = interval_lines(graph, relaxed.bounds) if interval else relaxed.lines
    lower, points = lower_bounds(graph, y, lines, where)
    spare = guard(graph, relaxed.bounds, y, unit(y.device))
    return Bounds(lower, spare, _at_weakest(lower - spare, points))


def _at_weakest(spared: Tensor, points: Tensor) -> Tensor:
    """(n, *image) those of `points` (n, s, *image) that belong to the least of `spared` (n, s)."""
    return points[torch.arange(len(points), device=points.device), spared.argmin(1)]


def _better(one: Bounds, two: Bounds) -> Bounds:
    """The better of two proofs, margin by margin; the points of the first."""
    return Bounds(torch.maximum(one.lower, two.lower), torch.minimum(one.guard, two.guard), one.worst)


def _undecided(graph: Graph, where: Region, y: Tensor, found: Bounds) -> Tensor:
    """(m,) the rows that are not proved, and that neither the image nor the point of the bound breaks."""
    ask = margins(graph, y, where.low)
    held = [torch.einsum("nk,nsk->ns", graph.forward(x), ask).amin(1) > 0 for x in (where.x, found.worst)]
    return (~found.certified & held[0] & held[1]).nonzero().squeeze(1)


def _climb(graph: Graph, where: Region, y: Tensor, found: Bounds, relaxed: Relaxation, ascent: Ascent) -> Bounds:
    """`found` after the ascent of the margins that are not proved yet."""
    rows = _undecided(graph, where, y, found)
    if not len(rows):
        return found
    here, spared = found.take(rows), (found.lower - found.guard)[rows]
    index = spared.argsort(dim=1)[:, : int((spared <= 0).sum(1).max())]
    asked = margins(graph, y[rows], spared)
    asked = asked.gather(1, index.unsqueeze(2).expand(-1, -1, asked.shape[2]))
    goal = here.guard.gather(1, index)
    lines = {at: line.take(rows) for at, line in relaxed.lines.items()}
    value, points = ascend(
        graph, len(graph.nodes) - 1, asked, lines, where.take(rows), ascent, ascent.steps, lambda lower: lower > goal
    )
    lower = here.lower.scatter(1, index, torch.maximum(value, here.lower.gather(1, index)))
    return found.put(rows, Bounds(lower, here.guard, _at_weakest(value - goal, points)))
