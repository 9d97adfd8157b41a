"""Subproblems of branch and bound, and their bounds: beta-CROWN (Wang et al. 2021, arXiv:2103.06624).

A subproblem fixes the signs of the arguments of some ReLUs. Each split enters the linear function of its argument
with a multiplier beta >= 0 (theorem 3.1); any such beta, and any lower slopes in [0, 1], give a sound bound. Several
constraints that an unsafe point must meet at once enter with weights of a simplex, by weak duality again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sparring.certificates.ascent import moved
from sparring.certificates.graph import Graph
from sparring.certificates.ibp import Bounds
from sparring.certificates.operators import Activation
from sparring.certificates.pulling import Relaxed, pull
from sparring.certificates.region import Region
from sparring.certificates.relaxation import relax, unstable
from sparring.core.batch import Rows

SLOPE, BETA, MIX = 0, 1, 2  # keys of what is climbed over
Variables = Mapping[int, Tensor]


@dataclass(frozen=True)
class Leaves(Rows):
    """Open subproblems: m of them, with at most d splits each; k slopes can be moved."""

    question: Tensor  # (m,) int64
    lower: Tensor  # (m,) float64: proved of the subproblem
    at: Tensor  # (m, d) int32: the ReLUs that are split, numbered through all layers; -1 from the last split on
    sign: Tensor  # (m, d) int8: 1 where the argument is at least zero, -1 where it is at most zero
    scale: Tensor  # (m, d) float32: in units of which betas are counted
    beta: Tensor  # (m, d) float32
    slope: Tensor  # (m, k) float32
    mix: Tensor  # (m, s) float64: of the constraints, on the simplex

    @property
    def depth(self) -> Tensor:
        """(m,) how many splits there are."""
        return (self.at >= 0).sum(1)

    def to(self, device: torch.device) -> Leaves:
        """The same on `device`."""
        return self._map(lambda _, tensor: tensor.to(device))


def joined(parts: Sequence[Leaves]) -> Leaves:
    """All of `parts` in one, padded to the deepest."""
    deepest = max(part.at.shape[1] for part in parts)
    names = [field.name for field in fields(Leaves)]
    parts = [padded(part, deepest) for part in parts]
    return Leaves(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def padded(leaves: Leaves, deepest: int) -> Leaves:
    """`leaves` with room for as many splits."""
    spare = (0, deepest - leaves.at.shape[1])
    blank = {"at": -1, "sign": 0, "scale": 0, "beta": 0}
    if not spare[1]:
        return leaves
    wider = {name: torch.nn.functional.pad(getattr(leaves, name), spare, value=v) for name, v in blank.items()}
    return replace(leaves, **wider)


def trimmed(leaves: Leaves) -> Leaves:
    """`leaves` without room for more splits than there are."""
    deepest = int(leaves.depth.max())
    return replace(leaves, **{k: getattr(leaves, k)[:, :deepest] for k in ("at", "sign", "scale", "beta")})


def children(leaves: Leaves, at: Tensor, scale: Tensor) -> Leaves:
    """(2m,) both halves of each of `leaves` (m,) when its ReLU `at` (m,) is split: first all where it is on."""
    depth = leaves.depth
    leaves = padded(leaves, int(depth.max()) + 1)
    column = depth[:, None]
    grown = replace(
        leaves,
        at=leaves.at.scatter(1, column, at[:, None].to(leaves.at.dtype)),
        scale=leaves.scale.scatter(1, column, scale[:, None].to(leaves.scale.dtype)),
    )
    side = torch.ones_like(column, dtype=leaves.sign.dtype)
    on, off = (replace(grown, sign=grown.sign.scatter(1, column, sign)) for sign in (side, -side))
    return joined([on, off])


@dataclass(frozen=True)
class Stem:
    """What the subproblems of all questions share: bounds that hold without any split.

    A question belongs to the case `home` (q,), one image and what is known there; it is proved when its subproblems
    all have a mix of asked . logits + offset above zero.
    """

    graph: Graph
    region: Region  # c cases
    bounds: Bounds  # c cases, of all nodes
    asked: Tensor  # (q, s, outputs)
    offset: Tensor  # (q, s)
    home: Tensor  # (q,)

    @cached_property
    def arguments(self) -> tuple[int, ...]:
        """The places of the arguments of ReLUs."""
        return tuple(sorted(set(self.relus.values())))

    @cached_property
    def relus(self) -> dict[int, int]:
        """The places of ReLUs, each with that of its argument, which other activations may share."""
        nodes = self.graph.nodes
        return {at: nodes[at].inputs[0] for at in self.graph.activations() if nodes[at].op == Activation("relu")}

    @cached_property
    def ends(self) -> tuple[Tensor, Tensor]:
        """(c, r) what the arguments of all ReLUs lie in."""
        low, high = ([self.bounds[at][end].flatten(1) for at in self.arguments] for end in (0, 1))
        nothing = self.region.low.new_zeros(len(self.region.low), 0)
        return torch.cat([*low, nothing], 1), torch.cat([*high, nothing], 1)

    @cached_property
    def free(self) -> Tensor:
        """(c, k) the unstable ReLUs of each case, and r where there are no more."""
        open_ = unstable(self.ends)
        k = int(open_.sum(1).max()) if open_.numel() else 0
        order = open_.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :k]
        return order.masked_fill(~open_.gather(1, order), open_.shape[1])

    @cached_property
    def other_lines(self) -> Relaxed:
        """Around activations that are no ReLUs."""
        nodes = self.graph.nodes
        found = {at: nodes[at].op for at in self.graph.activations() if at not in self.relus}
        return {at: relax(op, self.bounds[nodes[at].inputs[0]]) for at, op in found.items()}  # type: ignore[arg-type]  # activations

    def spread(self, values: Tensor) -> dict[int, Tensor]:
        """(..., r) values of all ReLUs, each layer's in its own shape by the place of the argument."""
        shapes = [self.graph.nodes[at].shape for at in self.arguments]
        parts = torch.split(values, [math.prod(shape) for shape in shapes], dim=-1)
        pairs = zip(self.arguments, shapes, parts, strict=True)
        return {at: part.reshape(*values.shape[:-1], *shape) for at, shape, part in pairs}

    def gather(self, values: Mapping[int, Tensor]) -> Tensor:
        """The other way: (n, r) of `values` (n, 1, *shape) by the place of the argument."""
        return torch.cat([values[at].flatten(1) for at in self.arguments], 1)

    def roots(self, questions: Tensor) -> Leaves:
        """The one subproblem of each of `questions` (m,) that has no splits."""
        m, device = len(questions), questions.device
        low, high = (self.ends[end][self.home[questions]] for end in (0, 1))
        pad = torch.nn.functional.pad((high > -low).float(), (0, 1))
        none = torch.zeros(m, 0, device=device)
        asked = self.asked.shape[1]
        return Leaves(
            questions,
            torch.full((m,), -torch.inf, dtype=torch.float64, device=device),
            none.to(torch.int32),
            none.to(torch.int8),
            none,
            none,
            pad.gather(1, self.free[self.home[questions]]),
            torch.full((m, asked), 1.0 / asked, dtype=torch.float64, device=device),
        )


class Frame:
    """Some `leaves` of a `stem`, ready to be bounded again and again in the arithmetic of `graph`."""

    def __init__(self, stem: Stem, leaves: Leaves, graph: Graph | None = None, dtype: Any = torch.float64) -> None:
        self.stem, self.leaves, self.graph, self.dtype = stem, leaves, graph or stem.graph, dtype
        case = stem.home[leaves.question]
        here = stem.region.take(case)
        self.region = replace(here, x=here.x.to(dtype), low=here.low.to(dtype), high=here.high.to(dtype))
        self.low, self.high = self._clipped(case)
        self.free, self.case = stem.free[case], case
        ends = zip(stem.spread(self.low).items(), stem.spread(self.high).values(), strict=True)
        around = {at: _cast(relax(Activation("relu"), (low, high)), dtype) for (at, low), high in ends}
        self.lines = {at: _cast(line.take(case), dtype) for at, line in stem.other_lines.items()}
        self.relus, self.around = stem.relus, around
        self.movable = stem.spread(unstable((self.low, self.high)))
        self.split_layers = {at for at, seen in stem.spread(self._split_anywhere()).items() if bool(seen.any())}

    def _split_anywhere(self) -> Tensor:
        """(r,) which ReLUs any of the leaves splits."""
        wide = self.low.shape[1]
        return torch.bincount(self.leaves.at[self.leaves.at >= 0].long(), minlength=wide) > 0

    def _clipped(self, case: Tensor) -> tuple[Tensor, Tensor]:
        """(m, r) bounds of the arguments under the splits."""
        low, high = (end[case] for end in self.stem.ends)
        row, column = (self.leaves.at >= 0).nonzero(as_tuple=True)
        at, on = self.leaves.at[row, column].long(), self.leaves.sign[row, column] > 0
        zero = low.new_zeros(())
        low = low.index_put((row[on], at[on]), low[row[on], at[on]].maximum(zero))
        return low, high.index_put((row[~on], at[~on]), high[row[~on], at[~on]].minimum(zero))

    def variables(self) -> dict[int, Tensor]:
        """(m, 1, ...) where the climb starts."""
        found = {SLOPE: self.leaves.slope, BETA: self.leaves.beta, MIX: self.leaves.mix}
        moving = {SLOPE} | ({BETA} if self.leaves.beta.shape[1] else set())
        moving |= {MIX} if self.leaves.mix.shape[1] > 1 else set()
        return {key: found[key].to(self.dtype).unsqueeze(1) for key in moving if found[key].numel()}

    def bound(self, given: Variables, watch: Callable[[int, Tensor], None] | None = None) -> tuple[Tensor, Tensor]:
        """(m, 1) lower bounds and (m, 1, *image) points."""
        stem = self.stem
        around = dict(self.around)
        if SLOPE in given:
            slopes = stem.spread(self._all(given[SLOPE]))
            around = {at: moved(line, self.movable[at], slopes[at]) for at, line in around.items()}
        lines = {**self.lines, **{at: around[argument] for at, argument in self.relus.items()}}
        push = self._pushed(given[BETA]) if BETA in given else None
        mix = given.get(MIX, self.leaves.mix.to(self.dtype).unsqueeze(1))
        asked, offset = (t[self.leaves.question].to(self.dtype) for t in (stem.asked, stem.offset))
        value, point = pull(
            self.graph, len(self.graph.nodes) - 1, mix @ asked, lines, self.region, push=push, watch=watch
        )
        return value + (mix @ offset.unsqueeze(2)).squeeze(2), point

    def alone(self) -> tuple[Tensor, Tensor]:
        """(m, s) bounds of each constraint by itself, with the lines of CROWN, and (m, s, *image) points."""
        asked, offset = (t[self.leaves.question].to(self.dtype) for t in (self.stem.asked, self.stem.offset))
        value, point = pull(self.graph, len(self.graph.nodes) - 1, asked, self.plain_lines, self.region)
        return value + offset, point

    @cached_property
    def plain_lines(self) -> Relaxed:
        """Around each activation, with the slopes of CROWN."""
        return {**self.lines, **{at: self.around[argument] for at, argument in self.relus.items()}}

    def slopes(self) -> Tensor:
        """(m, r) the lower slopes that the leaves come with."""
        own = self._all(self.leaves.slope.to(self.dtype).unsqueeze(1)).squeeze(1)
        return torch.where(unstable((self.low, self.high)), own, (self.low >= 0).to(self.dtype))

    def _all(self, slope: Tensor) -> Tensor:
        """(m, 1, r) slopes of all ReLUs, of (m, 1, k) of those that are free."""
        wide = self.low.shape[1]
        blank = slope.new_zeros(len(slope), 1, wide + 1)
        return blank.scatter(2, self.free.unsqueeze(1), slope)[..., :wide]

    def _pushed(self, beta: Tensor) -> dict[int, Tensor]:
        """What betas (m, 1, d) add to the linear functions of the arguments that are split."""
        index = self.leaves.at.long().clamp_min(0).unsqueeze(1)
        amount = -beta * (self.leaves.sign * self.leaves.scale).to(self.dtype).unsqueeze(1)
        added = self.stem.spread(beta.new_zeros(len(beta), 1, self.low.shape[1]).scatter_add(2, index, amount))
        return {at: added[at] for at in self.split_layers}


def sound(key: int, values: Tensor) -> Tensor:
    """The nearest variables that keep a bound sound: slopes in [0, 1], betas from 0, mixes on the simplex."""
    if key == SLOPE:
        return values.clamp(0.0, 1.0)
    values = values.clamp_min(0.0)
    if key == BETA:
        return values
    total = values.sum(-1, keepdim=True)
    return torch.where(total > 0, values / total.clamp_min(1e-300), 1.0 / values.shape[-1])


def cast(graph: Graph, dtype: torch.dtype) -> Graph:
    """`graph` with its weights rounded to `dtype`: to search with, not to prove with."""
    return replace(graph, nodes=tuple(replace(node, op=_cast(node.op, dtype)) for node in graph.nodes))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """A dataclass with its tensors of floating point in `dtype`."""
    held = {field.name: getattr(value, field.name) for field in fields(value)}
    tensors = {name: t for name, t in held.items() if isinstance(t, Tensor) and t.is_floating_point()}
    return replace(value, **{name: t.to(dtype) for name, t in tensors.items()})
