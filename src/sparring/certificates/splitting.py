"""Branch and bound over the inputs, for networks that have few of them.

A box that CROWN leaves open is halved (Bunel et al. 2020, arXiv:1909.06588, section 5) across the input along which
its linear bound falls furthest: the absolute coefficient times the width (Wang et al. 2018, arXiv:1809.08098).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.certificates.alpha import ascend
from sparring.certificates.ascent import Ascent
from sparring.certificates.branch import BROKEN, OPEN, PROVED, Confirm, Decision, Question
from sparring.certificates.crown import crown
from sparring.certificates.graph import Graph
from sparring.certificates.ibp import Bounds
from sparring.certificates.pulling import Relaxed, pull
from sparring.certificates.region import Region
from sparring.certificates.rounding import logit_error
from sparring.core.batch import Rows

_TRIES = 4  # points a turn that are worth a confirmation
_MIXES = 15  # steps towards the best weights of several constraints
_ASCENT = Ascent(steps=4, rate=0.3)
_AT_ONCE = 2**14  # numbers in the widest node: more would make a turn long
_SHARE = 0.1  # of the steepest slope: a flat line may lie below a bend, which only narrower boxes show
_FINEST = 2.0**-40  # of the first width: below it, halving gains nothing on rounding


@dataclass(frozen=True)
class Boxes(Rows):
    """Boxes that are still open, each with the question it belongs to and the bound of the box it was cut from."""

    low: Tensor  # (m, *shape) float64
    high: Tensor
    row: Tensor  # (m,) int64
    lower: Tensor  # (m,) float64


def joined(one: Boxes, two: Boxes) -> Boxes:
    """The boxes of both."""
    pairs = ((one.low, two.low), (one.high, two.high), (one.row, two.row), (one.lower, two.lower))
    return Boxes(*(torch.cat(pair) for pair in pairs))


@torch.no_grad()
def split_inputs(
    graph: Graph,
    region: Region,
    question: Question,
    *,
    deadline: float | None,
    confirm: Confirm,
    roundoff: float,
    width: int = 256,
) -> Decision:
    """What becomes of each row of `question` in its box of `region` until `deadline` (`time.monotonic`).

    A proof covers arithmetic that rounds to `roundoff`. The boxes with the lowest bounds go first, `width` at a time.
    `confirm` is asked of points (m, *shape) of the rows (m,) that break them in float64.
    """
    start, n, width = time.monotonic(), len(question.offset), max(16, min(width, _AT_ONCE // graph.widest))
    spare = guards(graph, crown(graph, region).bounds, question, roundoff)
    state = torch.full((n,), OPEN, dtype=torch.int8)
    floor, nodes = torch.full((n,), torch.inf, dtype=torch.float64), torch.zeros(n, dtype=torch.int64)
    stuck, point = torch.zeros(n, dtype=torch.bool), region.x
    open_ = Boxes(region.low, region.high, torch.arange(n), torch.full((n,), -torch.inf, dtype=torch.float64))
    finest = (region.high - region.low).flatten(1).amax(1) * _FINEST
    while len(open_.row) and (deadline is None or time.monotonic() < deadline):
        order = open_.lower.argsort(stable=True)
        now, rest = open_.take(order[:width]), open_.take(order[width:])
        bound, worst, slope = _bound(graph, now, question, spare[now.row])
        nodes = nodes.index_add(0, now.row, torch.ones_like(now.row))
        broken, where = _try(graph, now, worst, question, confirm)
        state, point = state.index_fill(0, broken, BROKEN), point.index_copy(0, broken, where)
        certain, lower = bound > 0, torch.maximum(bound, now.lower)
        floor = floor.scatter_reduce(0, now.row[certain], lower[certain], "amin")
        blunt = ~certain & ((now.high - now.low).flatten(1).amax(1) <= finest[now.row])
        stuck = stuck.index_fill(0, now.row[blunt], True)
        floor = floor.scatter_reduce(0, now.row[blunt], lower[blunt], "amin")
        cut = (~certain & ~blunt).nonzero().squeeze(1)
        halves = _halves(now.take(cut), slope[cut], lower[cut])
        open_ = joined(rest, halves)
        open_ = open_.take((state[open_.row] != BROKEN).nonzero().squeeze(1))
    left = torch.zeros(n, dtype=torch.bool).index_fill(0, open_.row, True) | stuck
    state = torch.where((state == OPEN) & ~left, PROVED, state).to(torch.int8)
    floor = floor.scatter_reduce(0, open_.row, open_.lower, "amin")
    return Decision(state, floor, point, nodes, time.monotonic() - start)


def guards(graph: Graph, bounds: Bounds, question: Question, roundoff: float) -> Tensor:
    """(n, s) how far arithmetic that rounds to `roundoff` moves each of `question` in `bounds` of n cases or one."""
    error = logit_error(graph, bounds, roundoff)
    return (question.asked.abs() @ error.unsqueeze(2)).squeeze(2)


def _bound(graph: Graph, boxes: Boxes, question: Question, spare: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a mix of the constraints: (m,) lower bounds less the rounding, (m, *shape) points, and absolute slopes.

    Some constraint is above zero where a mix of them with weights of the simplex is, so each mix is a bound.
    """
    where = Region((boxes.low + boxes.high) / 2, boxes.low, boxes.high)
    asked, last = question.asked[boxes.row], len(graph.nodes) - 1
    offset = question.offset[boxes.row] - spare
    lines = crown(graph, where).lines
    value, points, slopes = _linear(graph, asked, lines, where)
    weights, least = _mixed(slopes.flatten(2), value + offset, boxes.low.flatten(1), boxes.high.flatten(1))
    slope = torch.einsum("ms,ms...->m...", weights, slopes)
    point = points[torch.arange(len(weights)), weights.argmax(1)]
    open_ = (least <= 0).nonzero().squeeze(1)
    if len(open_):
        mixed = torch.einsum("ms,mso->mo", weights, asked)[open_, None]
        around = {at: line.take(open_) for at, line in lines.items()}
        shift = (weights * offset).sum(1)[open_]
        climbed, there = ascend(graph, last, mixed, around, where.take(open_), _ASCENT, _ASCENT.steps)
        point = point.index_copy(0, open_, there[:, 0])
        least = least.index_copy(0, open_, torch.maximum(least[open_], climbed[:, 0] + shift))
    return least, point, slope.abs()


def _linear(graph: Graph, asked: Tensor, lines: Relaxed, where: Region) -> tuple[Tensor, Tensor, Tensor]:
    """(m, s) lower bounds, (m, s, *shape) points, and the slopes (m, s, *shape) of the linear functions below.

    The least of a . x over a box is max(a, 0) . low + min(a, 0) . high: its two gradients add up to a.
    """
    with torch.enable_grad():
        low, high = (end.clone().requires_grad_() for end in (where.low, where.high))
        value, points = pull(graph, len(graph.nodes) - 1, asked, lines, Region(where.x, low, high))
        if not value.requires_grad:  # the network is constant here
            return value, points, torch.zeros_like(points)
        slopes = []
        for one in value.sum(0):
            up, down = torch.autograd.grad(one, (low, high), retain_graph=True)
            slopes.append(up + down)
    return value.detach(), points.detach(), torch.stack(slopes, 1)


def _mixed(a: Tensor, value: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """(m, s) weights and (m,) the bound of the mix, for functions `a` (m, s, d) with leasts `value` (m, s).

    The bound is concave in the weights, and each function's value at the mix's lowest point is a supergradient:
    exponentiated steps climb it, from the middle.
    """
    best, at = value.max(1)
    kept = torch.nn.functional.one_hot(at, value.shape[1]).to(value.dtype)
    if value.shape[1] == 1:
        return kept, best
    shift = value - torch.where(a >= 0, a * low[:, None], a * high[:, None]).sum(2)
    weights = torch.full_like(value, 1.0 / value.shape[1])
    for _ in range(_MIXES):
        total = torch.einsum("ms,msd->md", weights, a)
        met = shift + torch.einsum("msd,md->ms", a, torch.where(total >= 0, low, high))
        found = (weights * met).sum(1)
        kept = torch.where((found > best)[:, None], weights, kept)
        best = torch.maximum(best, found)
        width = (met.amax(1) - met.amin(1)).clamp_min(1e-30)
        weights = (weights.clamp_min(1e-30).log() + met / width[:, None]).softmax(1)
    return kept, best


def _try(graph: Graph, boxes: Boxes, worst: Tensor, question: Question, confirm: Confirm) -> tuple[Tensor, Tensor]:
    """(k,) rows that points of `boxes` break, and (k, *shape) one such point each."""
    points, row = torch.cat([worst, (boxes.low + boxes.high) / 2]), boxes.row.repeat(2)
    met = torch.einsum("mso,mo->ms", question.asked[row], graph.forward(points)) + question.offset[row]
    best = met.amax(1)
    tries = best.argsort()[:_TRIES]
    tries = tries[best[tries] <= 0]
    if len(tries):
        tries = tries[confirm(points[tries], row[tries])]
    return row[tries], points[tries]


def _halves(boxes: Boxes, slope: Tensor, lower: Tensor) -> Boxes:
    """Both halves of `boxes` (m,), whose bounds are `lower`, across the input that moves the bound most."""
    shape = boxes.low.shape
    low, high = boxes.low.flatten(1), boxes.high.flatten(1)
    slope = slope.flatten(1)
    least = _SHARE * slope.amax(1, keepdim=True)
    gain = torch.where(least > 0, torch.maximum(slope, least), 1.0) * (high - low)
    at = torch.nn.functional.one_hot(gain.argmax(1), low.shape[1]).bool()
    middle = (low + high) / 2
    return Boxes(
        torch.cat([low, torch.where(at, middle, low)]).view(-1, *shape[1:]),
        torch.cat([torch.where(at, middle, high), high]).view(-1, *shape[1:]),
        boxes.row.repeat(2),
        lower.repeat(2),
    )
