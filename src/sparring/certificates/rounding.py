"""How far a model's own floating-point logits may lie from the exact ones that the bounds speak of.

The standard a-priori analysis (Higham 2002, section 3.1): a sum of k products is off by at most gamma_k, which is
k u / (1 - k u), times the sum of their absolute values, in whatever order it is added up, with or without fused
multiply-adds. Errors made earlier spread by the absolute weights. Fast convolutions (Winograd, FFT) are outside it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparring.certificates.graph import Graph, needed
from sparring.certificates.operators import Activation, Interval, Linear

_SPARE = 4  # roundings more a node than its terms: of conversions, and of this computation itself


def unit(device: torch.device) -> float:
    """The unit roundoff of products of float32 on `device`: coarser where torch is allowed tf32 or bfloat16."""
    precision = torch.get_float32_matmul_precision()
    if precision == "medium":
        return 2.0**-8
    shortened = precision == "high" or (device.type == "cuda" and torch.backends.cudnn.allow_tf32)
    return 2.0**-11 if shortened else 2.0**-24


def logit_error(graph: Graph, bounds: Mapping[int, Interval], roundoff: float) -> Tensor:
    """(n, classes) how far the logits can be off anywhere in `bounds` if every operation is rounded to `roundoff`."""
    return error(graph, len(graph.nodes) - 1, bounds, roundoff)


def error(graph: Graph, place: int, bounds: Mapping[int, Interval], roundoff: float) -> Tensor:
    """(n, *shape) the same of the node at `place`."""
    errors = {0: torch.zeros_like(bounds[0][0])}
    for at in needed(graph.nodes, place)[1:]:
        node = graph.nodes[at]
        if isinstance(node.op, Activation):
            errors[at] = _through(node.op, errors[node.inputs[0]], bounds[node.inputs[0]], roundoff)
        elif isinstance(node.op, Linear):
            came = [errors[i] for i in node.inputs]
            sizes = [torch.maximum(-bounds[i][0], bounds[i][1]) + errors[i] for i in node.inputs]
            total = node.op.spread(*sizes)
            total = total if node.op.size is None else total + node.op.size
            gamma = (node.op.terms + _SPARE) * roundoff if node.op.terms else 0.0
            errors[at] = node.op.spread(*came) + gamma / (1 - gamma) * total
    return errors[place]


def _through(op: Activation, error: Tensor, bounds: tuple[Tensor, Tensor], roundoff: float) -> Tensor:
    """Activations do not stretch; a ReLU that is off stays exactly zero, and the others are rounded once more.

    A staircase answers exactly one of the values that its bounds allow, since these say what it makes of a rounded
    argument (see `stairs`).
    """
    if op.steps:
        return torch.zeros_like(error)
    if op.kind == "relu":
        return torch.where(bounds[1] + error > 0, error, torch.zeros_like(error))
    return error * (0.25 if op.kind == "sigmoid" else 1.0) + 2 * _SPARE * roundoff


def guard(graph: Graph, bounds: Mapping[int, Interval], y: Tensor, roundoff: float) -> Tensor:
    """(n, classes - 1) how far the margins of `y` (n,) can be off, in the order of `margins`."""
    off = logit_error(graph, bounds, roundoff)
    others = torch.arange(graph.classes, device=y.device).expand(len(y), -1)
    others = others[others != y[:, None]].view(len(y), -1)
    return off.gather(1, y[:, None]) + off.gather(1, others)
