"""Interval bound propagation: Gowal et al. 2018, arXiv:1810.12715, equations 4 to 6."""

from __future__ import annotations

from collections.abc import Mapping

from sparring.certificates.graph import Graph, Node
from sparring.certificates.operators import Activation, Interval, Linear
from sparring.certificates.region import Region
from sparring.certificates.stairs import blurred, stair_feet
from sparring.core.errors import ModelError

Bounds = Mapping[int, Interval]  # of the nodes by their places; each (n, *shape)


def intervals(graph: Graph, region: Region) -> dict[int, Interval]:
    """What every node lies in when the images lie in the box of `region`."""
    found: dict[int, Interval] = {}
    feet = stair_feet(graph)
    for place, node in enumerate(graph.nodes):
        found[place] = step(node, [found[i] for i in node.inputs]) if place else (region.low, region.high)
        if place in feet:
            found[place] = blurred(graph, place, found)
    return found


def step(node: Node, inputs: list[Interval]) -> Interval:
    """What `node` lies in when its inputs lie in theirs."""
    if isinstance(node.op, Activation):
        low, high = inputs[0]
        return node.op.forward(low), node.op.forward(high)
    if isinstance(node.op, Linear):
        return node.op.interval(*inputs)
    raise ModelError("expected a node with inputs, got the images themselves")
