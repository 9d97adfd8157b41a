"""How far a model's own floating-point logits may lie from the exact ones that the bounds speak of.

The standard a-priori analysis (Higham 2002, section 3.1): a sum of k products is off by at most gamma_k, which is
k u / (1 - k u), times the sum of their absolute values, in whatever order it is added up, with or without fused
multiply-adds. Errors made earlier spread by the absolute weights. A product too small for float32 may be lost, and
where a sum may be too large nothing is known. Fast convolutions (Winograd, FFT) are outside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparring.certificates.graph import Graph, needed
from sparring.certificates.operators import Activation, Interval, Linear

_LEAST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
_UNITS = {"tf32": 2.0**-11, "bf16": 2.0**-8}
_SPARE = 4  # roundings more a node than its terms: of conversions, and of this computation itself


def unit(device: torch.device) -> float:
    """The unit roundoff of the factors in products of float32 on `device`: coarser where torch may shorten them."""
    return max(_UNITS.get(name, 2.0**-24) for name in _allowed(device))


def _allowed(device: torch.device) -> list[str]:
    """What torch may compute products in: of matrices, and of convolutions."""
    on: Any = torch.backends
    cuda = device.type == "cuda"
    try:
        older = {"high": "tf32", "medium": "bf16"}.get(torch.get_float32_matmul_precision(), "ieee")
    except RuntimeError:  # it was set by the newer names, which say it all
        older = "ieee"
    if not hasattr(on, "fp32_precision"):  # torch before 2.9
        return [older, "tf32" if cuda and on.cudnn.allow_tf32 else "ieee"]
    parts = (on.cuda.matmul, on.cudnn.conv) if cuda else (on.mkldnn.matmul, on.mkldnn.conv)
    return [older, *(part.fp32_precision for part in parts)]


def _relative(terms: int, roundoff: float) -> float:
    """Gamma: of a sum of `terms` products whose factors are shortened to `roundoff`; the sum itself is of float32.

    So it is on tensor cores too, which cut off what float32 cannot hold, and round by 2^-23.
    """
    part = _SPARE * roundoff + terms * min(roundoff, 2.0**-23)
    return part / (1 - part) if part < 1 else math.inf


def logit_error(graph: Graph, bounds: Mapping[int, Interval], roundoff: float) -> Tensor:
    """(n, classes) how far logits can be off anywhere in `bounds` if factors are rounded to `roundoff`."""
    return error(graph, len(graph.nodes) - 1, bounds, roundoff)


def error(graph: Graph, place: int, bounds: Mapping[int, Interval], roundoff: float) -> Tensor:
    """(n, *shape) the same of the node at `place`."""
    errors = {0: torch.zeros_like(bounds[0][0])}
    held = torch.ones(len(errors[0]), dtype=torch.bool, device=errors[0].device)  # (n,) is every sum finite?
    for at in needed(graph.nodes, place)[1:]:
        node = graph.nodes[at]
        if isinstance(node.op, Activation):
            errors[at] = _through(node.op, errors[node.inputs[0]], bounds[node.inputs[0]], roundoff)
        elif isinstance(node.op, Linear):
            came = [errors[i] for i in node.inputs]
            sizes = [torch.maximum(-bounds[i][0], bounds[i][1]) + errors[i] for i in node.inputs]
            total = node.op.spread(*sizes)
            total = total if node.op.size is None else total + node.op.size
            errors[at] = node.op.spread(*came)
            if node.op.terms:
                lost = torch.where(total == 0, 0.0, (node.op.terms + _SPARE) * _LEAST)  # of zeros nothing is
                gamma = _relative(node.op.terms, roundoff)
                errors[at] = errors[at] + gamma * total + lost
                held = held & (total <= _LARGEST).flatten(1).all(1) & (gamma < math.inf)
    found = errors[place]
    return found.masked_fill(~held.view(-1, *(1,) * (found.dim() - 1)), torch.inf)


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
