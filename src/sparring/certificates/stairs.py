"""Staircases under rounding: which steps the model may take that exact arithmetic would not.

A bound elsewhere speaks of exact values, and what the model rounds is added up beside it. A staircase turns the
smallest error into a whole step, so its argument is bounded with the error inside: its bounds hold all that the model
can find there, hence the staircase all that it can answer, and behind it the errors begin at zero again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparring.certificates.graph import Graph, evaluate, needed
from sparring.certificates.operators import Activation, Interval, Operator, Rearrange, Scale
from sparring.certificates.rounding import error, unit


def stair_feet(graph: Graph) -> set[int]:
    """The places of the arguments of staircases."""
    return {node.inputs[0] for node in graph.nodes if isinstance(node.op, Activation) and node.op.steps}


def blurred(graph: Graph, place: int, bounds: Mapping[int, Interval]) -> Interval:
    """What the model finds at `place`: `bounds` there, wider by all that it rounds on the way."""
    with torch.no_grad():
        way = needed(graph.nodes, place)[1:]
        if all(_single(graph.nodes[at].op) for at in way):
            return _pixelwise(graph, way, bounds[0])
        low, high = bounds[place]
        off = error(graph, place, bounds, unit(low.device)) + _ours(bounds, (0, *way), low)
    return low - off, high + off


def _single(op: Operator) -> bool:
    """Does it make each entry of a single one?"""
    return isinstance(op, Scale) or (isinstance(op, Rearrange) and not op.terms)


def _ours(bounds: Mapping[int, Interval], way: Sequence[int], like: Tensor) -> Tensor:
    """(n, 1, ...) what float64 may have rounded in `bounds`: it counts where the model itself rounds nothing."""
    largest = torch.stack([end.flatten(1).abs().amax(1) for at in way for end in bounds[at]]).amax(0)
    return (2.0**-48 * largest).view(-1, *(1,) * (like.dim() - 1))


def _pixelwise(graph: Graph, way: list[int], pixels: Interval) -> Interval:
    """The same where `way` leads from `pixels` entry by entry: extremes lie at their ends, each with its own error.

    So black, and what else is computed exactly there, stays clear of the step that begins at it.
    """
    lows, highs = [], []
    for end in pixels:
        found = {0: end}
        for at in way:
            found[at] = evaluate(graph.nodes[at], [found[i] for i in graph.nodes[at].inputs])
        last = max(found)
        off = error(graph, last, {at: (value, value) for at, value in found.items()}, unit(end.device))
        lows.append(found[last] - off)
        highs.append(found[last] + off)
    return torch.minimum(*lows), torch.maximum(*highs)
