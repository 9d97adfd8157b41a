"""Models without an activation: the least margin over a box, or over box and ball together, is found exactly."""

from __future__ import annotations

from sparring.certificates.graph import Graph
from sparring.certificates.operators import Activation
from sparring.core.errors import ModelError


def check_linear(graph: Graph) -> None:
    """`ModelError` unless every node of `graph` is linear; then the linear bound of CROWN is the minimum itself."""
    kinds = sorted({node.op.kind for node in graph.nodes if isinstance(node.op, Activation)})
    if kinds:
        raise ModelError(f"expected a linear model, got one with {', '.join(kinds)}; use the method crown")
