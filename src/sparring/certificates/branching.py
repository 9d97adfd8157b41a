"""Which ReLU to split next: filtered smart branching (De Palma et al. 2021, arXiv:2104.06718, section 5).

A few ReLUs are picked by a quick score, both halves of each are really bounded, and the best pair is taken. The
scores are that of BaBSR's intercepts (Bunel et al. 2020, arXiv:1909.06588, section 5.2) and the part of the gap
that a ReLU causes at the point where the bound is attained.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.certificates.graph import Graph, evaluate
from sparring.certificates.subproblem import Frame, Leaves, Stem, children
from sparring.core.batch import Rows


@dataclass(frozen=True)
class Choice(Rows):
    """What to split: the ReLU `at` (m,), or -1 where none is left; and the `scale` (m,) of its coefficient."""

    at: Tensor
    scale: Tensor


def choose(stem: Stem, leaves: Leaves, graph: Graph, dtype: torch.dtype, candidates: int) -> Choice:
    """The best ReLU to split of each of `leaves`, of `candidates` by either score, computed with `graph`."""
    frame = Frame(stem, leaves, graph, dtype)
    open_ = (frame.low < 0) & (frame.high > 0)
    if not bool(open_.any()):
        return Choice(torch.full_like(leaves.question, -1), torch.ones_like(leaves.lower))
    seen: dict[int, Tensor] = {}
    _, point = frame.bound(frame.variables(), seen.__setitem__)
    coefficient = _coefficients(frame, seen)
    intercept, gap = _scores(frame, coefficient, point.squeeze(1), graph)
    count = min(candidates, open_.shape[1])
    picked = [score.masked_fill(~open_, -1.0).topk(count, dim=1).indices for score in (gap, intercept)]
    index = torch.cat(picked, 1)
    legal = open_.gather(1, index)
    rest = _weaker_half(stem, leaves, index.where(legal, index[:, :1]), coefficient, graph, dtype)
    # The first guess decides where halves are alike: it is the larger part of the gap.
    best = rest.masked_fill(~legal, -torch.inf).argmax(1, keepdim=True)
    at = index.gather(1, best)
    scale = coefficient.gather(1, at).abs()
    found = torch.where(open_.any(1), at.squeeze(1), -1)
    return Choice(found, _at_least(scale.squeeze(1), coefficient))


def _at_least(scale: Tensor, coefficient: Tensor) -> Tensor:
    """`scale` (m,), or a hundredth of the largest where it is next to nothing."""
    return torch.maximum(scale, 0.01 * coefficient.abs().amax(1)).clamp_min(1e-12)


def _coefficients(frame: Frame, seen: dict[int, Tensor]) -> Tensor:
    """(m, r) of the values of all ReLUs in the linear function below; of several at one argument, the sum."""
    total: dict[int, Tensor] = {}
    for at, argument in frame.relus.items():
        held = seen.get(at)
        held = torch.zeros_like(frame.movable[argument].unsqueeze(1), dtype=frame.dtype) if held is None else held
        total[argument] = total[argument] + held if argument in total else held
    return frame.stem.gather(total)


def _scores(frame: Frame, coefficient: Tensor, point: Tensor, graph: Graph) -> tuple[Tensor, Tensor]:
    """(m, r) what the intercept of each ReLU takes from the bound, and what its lines do at `point` (m, *image)."""
    low, high = frame.low.to(frame.dtype), frame.high.to(frame.dtype)
    width = (high - low).clamp_min(1e-30)
    intercept = coefficient.clamp_max(0.0) * high * low / width
    values = [point]
    for node in graph.nodes[1:]:
        values.append(evaluate(node, [values[i] for i in node.inputs]))
    z = frame.stem.gather({at: values[at] for at in frame.stem.arguments})
    above = high / width * (z - low) - z.clamp_min(0.0)
    slope = frame.slopes()
    below = z.clamp_min(0.0) - slope * z
    return intercept, torch.where(coefficient < 0, -coefficient * above, coefficient * below)


def _weaker_half(
    stem: Stem, leaves: Leaves, index: Tensor, coefficient: Tensor, graph: Graph, dtype: torch.dtype
) -> Tensor:
    """(m, k) the lower of the bounds of both halves when the ReLU at `index` (m, k) is split, without a climb."""
    m, k = index.shape
    again = leaves.take(torch.arange(m, device=index.device).repeat_interleave(k))
    halves = children(again, index.flatten(), coefficient.gather(1, index).abs().flatten())
    frame = Frame(stem, halves, graph, dtype)
    value, _ = frame.bound(frame.variables())
    return value.view(2, m, k).amin(0)
