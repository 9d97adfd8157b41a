"""A few steps from where a bound is attained towards an unsafe point: most that exist are near one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparring.certificates.graph import Graph
from sparring.certificates.region import Region


def descend(
    graph: Graph, where: Region, asked: Tensor, offset: Tensor, start: Tensor, steps: int, late: Callable[[], bool]
) -> tuple[Tensor, Tensor]:
    """(m, *image) points of the region and their max over s of asked . logits + offset, the least on the way.

    Signed gradient steps from `start` (m, *image), in the Euclidean ball normalised ones, shrinking from half of the
    region. `asked` is (m, s, outputs) and `offset` (m, s). It ends early when it is `late`.
    """
    x = inside(where, start)
    best = x
    least = torch.full_like(offset[:, 0], torch.inf)
    for step in range(steps + 1):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            value = (torch.einsum("nk,nsk->ns", graph.forward(leaf), asked) + offset).amax(1)
            last = step == steps or late()
            gradient = leaf if last else torch.autograd.grad(value.sum(), leaf)[0]
        lower = value.detach() < least
        least = torch.where(lower, value.detach(), least)
        best = torch.where(_wide(lower, x), x, best)
        if last:
            break
        x = inside(where, x - 2.0 ** -(1 + 3 * step / steps) * _stride(where, gradient))
    return best, least


def _stride(where: Region, gradient: Tensor) -> Tensor:
    if where.radius is None:
        return gradient.sign() * (where.high - where.low)
    length = gradient.flatten(1).norm(dim=1).clamp_min(1e-30)
    return gradient / _wide(length, gradient) * 2 * where.radius


def inside(where: Region, x: Tensor) -> Tensor:
    """`x` (m, *image) moved into the region: along the line to the image into the ball, then into the box."""
    if where.radius is not None:
        away = x - where.x
        length = away.flatten(1).norm(dim=1)
        x = where.x + away * _wide((where.radius / length.clamp_min(1e-30)).clamp_max(1.0), away)
    return torch.minimum(torch.maximum(x, where.low), where.high)


def _wide(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (like.dim() - 1))
