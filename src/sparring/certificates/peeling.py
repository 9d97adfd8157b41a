"""A staircase on the pixels themselves, taken off: behind it there is a box again, and a smaller graph.

Whatever a guard like `round(7 x) / 7` is shown, what follows sees a pixel between two of its values, and nothing else
of the image. So the search for a proof, or for an adversarial image, goes on in that box, as it would in an image's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparring.certificates.graph import Graph, Node
from sparring.certificates.ibp import intervals
from sparring.certificates.operators import Activation, Input, Reshape, Scale
from sparring.certificates.region import Region

_ROUNDS = 12  # halvings of the way to a step: what is left keeps clear of rounding, most often


@dataclass(frozen=True)
class Peeled:
    """What follows the staircase and where its answers lie; or all of the graph, and its images."""

    graph: Graph
    region: Region
    images: Callable[[Tensor, Tensor], Tensor]
    """(m, *image) of the first region for points (m, *shape) of this one, of its rows (m,)"""


def peel(graph: Graph, region: Region) -> Peeled:
    """`graph` without the staircase that every path from the images meets first, if it looks at single pixels."""
    last = _first_stairs(graph.nodes)
    if last is None:
        return Peeled(graph, region, lambda points, _: points)
    front = replace(graph, nodes=graph.nodes[: last + 1])
    low, high = intervals(front, region)[last]
    nodes = (Node(Input(), (), graph.nodes[last].shape), *(_moved(node, last) for node in graph.nodes[last + 1 :]))

    def images(points: Tensor, rows: Tensor) -> Tensor:
        return _shown(front, region.take(rows), points)

    return Peeled(replace(graph, nodes=nodes), Region(front.forward(region.x), low, high), images)


def _first_stairs(nodes: Sequence[Node]) -> int | None:
    """The place of the staircase that alone hangs on the images, entry by entry; None where there is none."""
    at = 0
    while True:
        users = [place for place, node in enumerate(nodes) if at in node.inputs]
        if len(users) != 1:
            return None
        at = users[0]
        op = nodes[at].op
        if isinstance(op, Activation) and op.steps:
            return at if at + 1 < len(nodes) else None
        if not isinstance(op, Scale | Reshape):
            return None


def _moved(node: Node, by: int) -> Node:
    return replace(node, inputs=tuple(place - by for place in node.inputs))


def _shown(front: Graph, region: Region, points: Tensor) -> Tensor:
    """(m, *image) near the images of `region` (m rows), of which `front` makes the values nearest to `points`.

    All values of staircases are whole numbers. A pixel goes towards the end of its range that lies beyond the step,
    and no farther than just across it.
    """

    def seen(x: Tensor) -> Tensor:
        return front.forward(x).view_as(x)

    x, now, low, high = region.x, seen(region.x), seen(region.low), seen(region.high)
    wanted = points.view_as(x).round().clamp(torch.minimum(low, high), torch.maximum(low, high))
    end = torch.where((wanted > now) == (high > low), region.high, region.low)
    short, far = torch.zeros_like(x), torch.ones_like(x)
    for _ in range(_ROUNDS):
        middle = (short + far) / 2
        across = (seen(x + middle * (end - x)) - now).abs() >= (wanted - now).abs()
        short, far = torch.where(across, short, middle), torch.where(across, middle, far)
    return torch.where(wanted == now, x, x + far * (end - x))
