"""CROWN near the images, where an entry of a feature map sees a small window only.

The linear functions of such entries are kept as windows of a feature map each, at places of their own: a tenth and
less of the whole map for the first layers of a convolutional network. All rows' questions stand in one list.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sparring.certificates.ascent import Ascent, Slopes, climb, movable, moved
from sparring.certificates.graph import Graph
from sparring.certificates.operators import Activation, Conv, Interval, Linear, Scale
from sparring.certificates.pulling import Relaxed
from sparring.certificates.region import Region
from sparring.certificates.relaxation import Lines

_MATRIX = 2**24  # products: above it a convolution of windows is not written as a matrix
_WORTH = 0.5  # of the image: above it whole maps are as fast


@dataclass(frozen=True)
class Spot:
    """Windows of `span` (h, w) cells, one for each of m questions, in the map of `row` (m,) at `top`, `left` (m,)."""

    row: Tensor
    top: Tensor
    left: Tensor
    span: tuple[int, int]

    def cells(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """(m, h, w) places of the cells in the maps, of `shape` (c, height, width), of all rows; and which exist."""
        _, height, width = shape
        steps = [torch.arange(size, device=self.row.device) for size in self.span]
        down, along = (self.top[:, None] + steps[0])[:, :, None], (self.left[:, None] + steps[1])[:, None, :]
        inside = (down >= 0) & (down < height) & (along >= 0) & (along < width)
        place = down.clamp(0, height - 1) * width + along.clamp(0, width - 1)
        return place + self.row[:, None, None] * (height * width), inside

    def cut(self, values: Tensor, place: Tensor) -> Tensor:
        """(m, 1, c, h, w) what stands in `values` (n, c, height, width) at the cells `place`."""
        flat = values.permute(0, 2, 3, 1).reshape(-1, values.shape[1])
        return flat[place.flatten()].view(*place.shape, -1).permute(0, 3, 1, 2).unsqueeze(1)

    def before(self, op: Linear | Activation) -> Spot:
        """The windows that these see through `op`."""
        if not isinstance(op, Conv):
            return self
        sizes = zip(self.span, op.stride, op.dilation, op.weight.shape[2:], strict=True)
        high, wide = ((s - 1) * stride + dilation * (k - 1) + 1 for s, stride, dilation, k in sizes)
        (down, along), (over, aside) = op.stride, op.padding
        return Spot(self.row, self.top * down - over, self.left * along - aside, (high, wide))


@dataclass(frozen=True)
class _Step:
    """One node on the way back: its lines, cut to the windows, or its linear map, and which cells exist before it."""

    place: int
    op: Linear | Activation
    shape: tuple[int, ...]
    lines: Lines | None
    inside: Tensor | None


def chain(graph: Graph, at: int) -> list[int] | None:
    """The places from `at` back to the images if each node has a single small window there, else None."""
    found: list[int] = []
    nothing = torch.zeros(0, dtype=torch.int64)
    spot = Spot(nothing, nothing, nothing, (1, 1))
    while at:
        node = graph.nodes[at]
        found.append(at)
        if len(node.shape) != 3 or not isinstance(node.op, Conv | Activation | Scale):
            return None
        if isinstance(node.op, Scale) and not (_of_channels(node.op.factor) and _of_channels(node.op.shift)):
            return None
        spot = spot.before(node.op)
        (at,) = node.inputs
    small = math.prod(spot.span) <= _WORTH * math.prod(graph.nodes[0].shape[1:])
    return found if small else None


def _of_channels(values: Tensor | None) -> bool:
    """Are they the same at every cell of a channel?"""
    return values is None or values.numel() == 1 or (values.dim() == 3 and values.shape[1:] == (1, 1))


def tighten(
    graph: Graph,
    path: list[int],
    bounds: Interval,
    open_: Tensor,
    lines: Relaxed,
    region: Region,
    at_once: int,
    ascent: Ascent | None = None,
) -> Interval:
    """`bounds` (n, d) of the node at the head of `path`, cut with CROWN's at `open_` (n, d), `at_once` at a time.

    With an `ascent`, each is climbed for with slopes of its own.
    """
    low, high = bounds
    row, entry = open_.nonzero(as_tuple=True)
    found: list[tuple[Tensor, Tensor]] = []
    for some in torch.split(torch.arange(len(row), device=low.device), at_once):
        value = _ask(graph, path, row[some].repeat(2), entry[some].repeat(2), lines, region, ascent)
        below, above = value.chunk(2)
        found.append((below, -above))
    at = row * low.shape[1] + entry
    below, above = (torch.cat(parts) for parts in zip(*found, strict=True))
    below = torch.maximum(below, low.flatten()[at])
    above = torch.minimum(above, high.flatten()[at])
    return low.flatten().index_copy(0, at, below).view_as(low), high.flatten().index_copy(0, at, above).view_as(high)


def _ask(
    graph: Graph,
    path: list[int],
    row: Tensor,
    entry: Tensor,
    lines: Relaxed,
    region: Region,
    ascent: Ascent | None,
) -> Tensor:
    """(2k,) lower bounds of k entries of rows, and then of their negatives."""
    channels, height, width = graph.nodes[path[0]].shape
    one = torch.zeros(len(row), channels, dtype=region.low.dtype, device=row.device)
    sign = torch.ones_like(one[:, :1])
    sign[len(row) // 2 :] = -1.0
    one = one.scatter(1, (entry // (height * width))[:, None], sign)[:, :, None, None]
    steps, spot = [], Spot(row, entry // width % height, entry % width, (1, 1))
    for at in path:
        step, spot = _step(graph, at, spot, lines)
        steps.append(step)
    place, _ = spot.cells(graph.nodes[0].shape)
    x, least, largest = (spot.cut(end, place).squeeze(1) for end in (region.x, region.low, region.high))
    here = Region(x, least, largest, region.radius)
    found = {step.place: movable(step.lines) for step in steps if step.lines is not None}
    splits = {at: split for at, split in found.items() if split is not None}

    def bound(slopes: Slopes) -> tuple[Tensor, Tensor]:
        graph.pause()
        return _pull(steps, one, here, splits, slopes)

    if ascent is None or not splits:
        return bound({})[0].squeeze(1)
    start = {step.place: step.lines.low_slope for step in steps if step.lines is not None and step.place in splits}
    known = {at: slope for at, slope in start.items() if slope is not None}
    return climb(bound, known, ascent, ascent.deep)[0].squeeze(1)


def _step(graph: Graph, at: int, spot: Spot, lines: Relaxed) -> tuple[_Step, Spot]:
    """The node at `at`, as the windows `spot` of its output see it, and their windows of its input."""
    node = graph.nodes[at]
    assert isinstance(node.op, Activation | Conv | Scale)
    if isinstance(node.op, Activation):
        place, line = spot.cells(node.shape)[0], lines[at]
        given = (line.low_slope, line.low_shift, line.high_slope, line.high_shift)
        low, low_shift, high, high_shift = (None if t is None else spot.cut(t, place) for t in given)
        assert high_shift is not None
        return _Step(at, node.op, node.shape, Lines(low, low_shift, high, high_shift), None), spot
    seen = spot.before(node.op)
    padded = isinstance(node.op, Conv) and any(node.op.padding)
    inside = seen.cells(graph.nodes[node.inputs[0]].shape)[1] if padded else None
    return _Step(at, node.op, node.shape, None, inside), seen


def _pull(
    steps: list[_Step], a: Tensor, region: Region, splits: dict[int, Tensor], slopes: Slopes
) -> tuple[Tensor, Tensor]:
    """(m, 1) lower bounds of the questions `a` (m, c, 1, 1), and (m, 1, ...) windows of where they are attained."""
    constant = torch.zeros_like(a[:, :1, 0, 0])
    for step in steps:
        if step.lines is not None:
            line = moved(step.lines, splits[step.place], slopes[step.place]) if step.place in slopes else step.lines
            pulled, shift = line.pull(a.unsqueeze(1))
            constant = constant + shift
            if pulled is None:
                return constant, region.x.unsqueeze(1)
            a = pulled.squeeze(1)
            continue
        assert isinstance(step.op, Conv | Scale)
        if step.op.offset is not None:
            constant = constant + a.sum((2, 3)) @ step.op.offset.expand(step.shape)[:, :1, 0]
        a = _conv_back(a, step.op) if isinstance(step.op, Conv) else a * step.op.factor
        a = a if step.inside is None else a * step.inside[:, None]
    value, point = region.lowest(a.unsqueeze(1))
    return constant + value, point


def _conv_back(a: Tensor, op: Conv) -> Tensor:
    """The transposed convolution of windows `a`, without padding."""

    def back(windows: Tensor) -> Tensor:
        return F.conv_transpose2d(windows, op.weight, None, op.stride, 0, 0, op.groups, op.dilation)

    inputs = math.prod(a.shape[1:])
    if inputs * len(op.weight) * op.weight[0].numel() > _MATRIX or len(a) < inputs:
        return back(a)
    # Many windows of one size: one matrix product is several times faster than the convolution of each.
    unit = back(torch.eye(inputs, dtype=a.dtype, device=a.device).view(inputs, *a.shape[1:]))
    return (a.flatten(1) @ unit.flatten(1)).view(len(a), *unit.shape[1:])
