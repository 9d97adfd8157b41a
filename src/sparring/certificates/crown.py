"""CROWN: linear functions below every margin, pulled back from the logits to the images.

Zhang et al. 2018, arXiv:1811.00866, theorem 3.2, with the adaptive lower slope of section 3.3. Every argument of
an activation is bounded in the same way first, as far as interval propagation leaves open which side of its kink
it is on. CROWN-IBP (Zhang et al. 2020, arXiv:1906.06316) takes these bounds from intervals and pulls back only
the margins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.certificates import windows
from sparring.certificates.alpha import ascend
from sparring.certificates.ascent import Ascent
from sparring.certificates.graph import Graph
from sparring.certificates.ibp import Bounds, intervals, step
from sparring.certificates.operators import Activation, Interval, Linear, Reshape, Scale
from sparring.certificates.pulling import Relaxed, pull
from sparring.certificates.region import Region
from sparring.certificates.relaxation import Lines, bent, flat, relax
from sparring.certificates.stairs import blurred, stair_feet

_AT_ONCE = {"cpu": 2**18, "cuda": 2**25}  # numbers in the widest node of one pull: what the caches hold


@dataclass(frozen=True)
class Relaxation:
    """Bounds on every node, and lines around every activation that follow from them."""

    bounds: Bounds
    lines: Relaxed


def crown_ibp(graph: Graph, region: Region) -> Relaxation:
    """Bounds from intervals."""
    bounds = intervals(graph, region)
    return Relaxation(bounds, {at: relax(*_activation(graph, at, bounds)) for at in graph.activations()})


def interval_lines(graph: Graph, bounds: Bounds) -> Relaxed:
    """The constants that interval propagation puts around each activation."""
    return {at: flat(*_activation(graph, at, bounds)) for at in graph.activations()}


def _activation(graph: Graph, at: int, bounds: Bounds) -> tuple[Activation, Interval]:
    node = graph.nodes[at]
    assert isinstance(node.op, Activation)
    return node.op, bounds[node.inputs[0]]


def crown(graph: Graph, region: Region, *, known: Bounds | None = None, ascent: Ascent | None = None) -> Relaxation:
    """Bounds from CROWN for the arguments of activations, from intervals for the rest; never wider than `known`.

    With an `ascent`, the bounds of arguments are climbed for too, one layer after the other. Each is then nearly the
    best that the triangle relaxation of the layers before it gives.
    """
    bounds: dict[int, Interval] = {}
    lines: dict[int, Lines] = {}
    feet = stair_feet(graph)
    ops = {node.inputs[0]: node.op for node in graph.nodes if isinstance(node.op, Activation)}
    sharp = _sharp(graph) if region.radius is None else {0}
    for at, node in enumerate(graph.nodes):
        bounds[at] = step(node, [bounds[i] for i in node.inputs]) if at else (region.low, region.high)
        if known is not None:
            low, high = bounds[at]
            bounds[at] = torch.maximum(low, known[at][0]), torch.minimum(high, known[at][1])
        if isinstance(node.op, Activation):  # before it is asked about itself, as the argument of another one
            lines[at] = relax(node.op, bounds[node.inputs[0]])
        if at in ops and at not in sharp:
            bounds[at] = tighten(graph, at, bounds[at], lines, region, ops[at], ascent)
        if at in feet:
            bounds[at] = blurred(graph, at, bounds)
    return Relaxation(bounds, lines)


def _sharp(graph: Graph) -> set[int]:
    """The nodes whose interval over a box is exact: one linear map at most, but for what acts on single entries."""
    maps = {0: 0}
    for at, node in enumerate(graph.nodes[1:], start=1):
        if len(node.inputs) == 1 and node.inputs[0] in maps and isinstance(node.op, Linear):
            count = maps[node.inputs[0]] + (not isinstance(node.op, Scale | Reshape))
            if count <= 1:
                maps[at] = count
    return set(maps)


def tighten(
    graph: Graph,
    at: int,
    bounds: Interval,
    lines: Relaxed,
    region: Region,
    op: Activation,
    ascent: Ascent | None = None,
) -> Interval:
    """`bounds` of the node at `at` cut with CROWN's, where the lines around `op` can gain by it."""
    low, high = (end.flatten(1) for end in bounds)
    open_ = bent(op, (low, high))
    counts = open_.sum(1)
    if not counts.any():
        return bounds
    path = windows.chain(graph, at)
    if path is not None:
        ends = windows.tighten(graph, path, (low, high), open_, lines, region, 4 * _questions(graph, low), ascent)
        return ends[0].view_as(bounds[0]), ends[1].view_as(bounds[1])
    first = open_.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    order = counts.argsort(descending=True)
    parts: list[tuple[Tensor, Tensor]] = []
    for rows in _groups(counts[order].tolist(), _questions(graph, low)):
        row = order[rows.start : rows.stop]
        here = region.take(row)
        around = {place: line.take(row) for place, line in lines.items()}
        ends = (low[row], high[row])
        for index in torch.split(
            first[row, : int(counts[row[0]])], max(1, _questions(graph, low) // (2 * len(row))), 1
        ):
            ends = _ask(graph, at, ends, index, around, here, open_[row].gather(1, index), ascent)
        parts.append(ends)
    back = order.argsort()
    shape = bounds[0].shape
    return torch.cat([p[0] for p in parts])[back].view(shape), torch.cat([p[1] for p in parts])[back].view(shape)


def _ask(
    graph: Graph,
    at: int,
    ends: Interval,
    index: Tensor,
    lines: Relaxed,
    region: Region,
    open_: Tensor,
    ascent: Ascent | None,
) -> Interval:
    """`ends` (n, d) where those entries at `index` (n, k) that are `open_` (n, k) are cut with what a pull says."""
    low, high = ends
    one = torch.zeros(*index.shape, low.shape[1], dtype=low.dtype, device=low.device)
    one = one.scatter(2, index.unsqueeze(2), 1.0).view(*index.shape, *graph.nodes[at].shape)
    ask = torch.cat([one, -one], 1)
    if ascent is None:
        found, _ = pull(graph, at, ask, lines, region)
    else:
        found, _ = ascend(graph, at, ask, lines, region, ascent, ascent.deep)
    below, above = (half.masked_fill(~open_, -torch.inf) for half in found.chunk(2, 1))
    low = low.scatter(1, index, torch.maximum(low.gather(1, index), below))
    return low, high.scatter(1, index, torch.minimum(high.gather(1, index), -above))


def _questions(graph: Graph, like: Tensor) -> int:
    """How many questions one pull takes at once."""
    return max(2, _AT_ONCE.get(like.device.type, 2**18) // graph.widest)


def _groups(counts: list[int], questions: int) -> Iterator[range]:
    """Runs of rows, sorted by their falling `counts`, whose questions (two each) make one pull."""
    start = 0
    while start < len(counts):
        size = max(1, questions // max(1, 2 * counts[start]))
        yield range(start, min(start + size, len(counts)))
        start += size


def margins(graph: Graph, y: Tensor, like: Tensor) -> Tensor:
    """(n, classes - 1, classes) what to ask of the logits: that of label `y` (n,) less each other one, in order."""
    one = torch.eye(graph.classes, dtype=like.dtype, device=like.device)
    others = torch.arange(graph.classes, device=y.device).expand(len(y), -1)
    others = others[others != y[:, None]].view(len(y), -1)
    return one[y].unsqueeze(1) - one[others]


def lower_bounds(graph: Graph, y: Tensor, relaxed: Relaxed, region: Region) -> tuple[Tensor, Tensor]:
    """(n, classes - 1) lower bounds of the margins and (n, classes - 1, *image) points where they are attained."""
    return pull(graph, len(graph.nodes) - 1, margins(graph, y, region.low), relaxed, region)
