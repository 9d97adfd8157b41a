"""Linear functions of a node, pulled back to the images: Zhang et al. 2018, arXiv:1811.00866, theorem 3.2."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from sparring.certificates.graph import Graph, Node
from sparring.certificates.operators import Linear
from sparring.certificates.region import Region
from sparring.certificates.relaxation import Lines

Relaxed = Mapping[int, Lines]  # of the activations by their places


def pull(
    graph: Graph,
    place: int,
    a: Tensor,
    lines: Relaxed,
    region: Region,
    *,
    push: Mapping[int, Tensor] | None = None,
    watch: Callable[[int, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """(n, s) lower bounds of a . z over `region`, z the value of the node at `place`, and where they are attained.

    `a` is (n, s, *shape): s questions of each row. The points are (n, s, *image). `push` (n, s, *shape) is added to
    the linear function of the nodes that it names. `watch` is told the place of each activation and the linear
    function of its value, (n, s, *shape).
    """
    constant, reached = linear(graph, place, a, lines, push=push, watch=watch)
    if reached is None:
        return constant, region.x.unsqueeze(1).expand(-1, a.shape[1], *graph.nodes[0].shape)
    value, point = region.lowest(reached)
    return constant + value, point


def linear(
    graph: Graph,
    place: int,
    a: Tensor,
    lines: Relaxed,
    *,
    push: Mapping[int, Tensor] | None = None,
    watch: Callable[[int, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Constants (n, s) and slopes (n, s, *image), None where zero, of a linear function of the image below a . z."""
    graph.pause()
    rows, asked = a.shape[:2]
    pending, constant = {place: a}, a.new_zeros(rows, asked)
    push = push or {}
    for at in range(place, 0, -1):
        if at not in pending:
            continue
        node, own = graph.nodes[at], pending.pop(at)
        own = own + push[at] if at in push else own
        if watch is not None and at in lines:
            watch(at, own)
        pulled, shift = _pull(node, own, lines.get(at))
        constant = constant if shift is None else constant + shift
        for source, part in zip(node.inputs, pulled, strict=True):
            if part is not None:
                pending[source] = pending[source] + part if source in pending else part
    reached = pending.get(0)
    if reached is not None and 0 in push:
        reached = reached + push[0]
    return constant, reached


def _pull(node: Node, a: Tensor, lines: Lines | None) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
    if lines is not None:
        slope, constant = lines.pull(a)
        return (slope,), constant
    assert isinstance(node.op, Linear)
    offset = node.op.offset
    shift: Tensor | None = None if offset is None else a.flatten(2) @ offset.expand(node.shape).flatten()
    parts = node.op.transpose(a.flatten(0, 1))
    return tuple(None if p is None else p.reshape(*a.shape[:2], *p.shape[1:]) for p in parts), shift
