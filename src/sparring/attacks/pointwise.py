"""Pointwise: set the features of a noisy image back, one after the other, while it still fools; labels only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.attacks.hopskipjump import ending, fools
from sparring.core import noise
from sparring.core.attack import Observation, State
from sparring.core.batch import Batch, per_row
from sparring.core.model import Access

_SHARES = 5  # of features in a noisy start: 1/16, 1/8, 1/4, 1/2 and all, in turn


@dataclass(frozen=True)
class PointwiseState(State):
    """Which features are still changed; `x` may have too many, but the last point has not."""

    k: Tensor  # (n,) queries answered
    begun: Tensor  # (n,) noisy starts asked about
    best: Tensor  # (n, c, h, w) the point of this round; it fools
    order: Tensor  # (n, d) features as they are visited in this pass, the changed ones first
    changed: Tensor  # (n,) how many were changed as this pass began; 0: a start is asked for
    place: Tensor  # (n,) the first feature of the block on trial
    size: Tensor  # (n,) features in a block
    gained: Tensor  # (n,) bool: has this pass set any back?


@dataclass(frozen=True)
class Pointwise:
    """Greedily set blocks of features back to the image's, halving the blocks, until no single one can be.

    Schott et al. 2019, the Pointwise attack. There features go back one by one; here a round begins with
    half of them at once and halves the blocks after every pass, which spends fewer queries and ends alike: at a
    point none of whose changed features can be set back alone. Rounds follow from new starts, black and white noise
    on a share of the features, while queries are left.
    """

    steps: int = 2000

    name: ClassVar[str] = "pointwise"
    version: ClassVar[int] = 1
    needs: ClassVar[Access] = Access.DECISION
    norms: ClassVar[tuple[str, ...]] = ("l0",)
    paper: ClassVar[str] = "Schott et al. 2019, arXiv:1805.09190"
    minimizes: ClassVar[bool] = True
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> PointwiseState:
        """Ask about a first noisy image."""
        zero, none = torch.zeros_like(batch.y), torch.zeros_like(batch.targeted)
        order = torch.arange(batch.x[0].numel(), device=batch.x.device).expand(len(zero), -1).contiguous()
        x = _noisy(batch, zero)
        return PointwiseState(x, none, zero, zero, batch.x, order, zero, zero, zero, none)

    def step(self, batch: Batch, state: PointwiseState, seen: Observation) -> PointwiseState:
        """Keep what still fools, and try the next block, pass or start."""
        fooled = fools(batch, seen)
        starting = state.changed == 0
        best = torch.where(per_row(fooled, state.x), state.x, state.best)
        gained = state.gained | (fooled & ~starting)
        place = state.place + state.size
        over = (place >= state.changed) & ~starting
        stuck = over & (state.size == 1) & ~gained
        k, begun = state.k + 1, state.begun + starting
        after = replace(state, k=k, begun=begun, best=best, place=place, gained=gained)
        rows = ((over & ~stuck) | (starting & fooled)).nonzero().squeeze(1)
        if len(rows):
            after = after.put(rows, _pass(batch.take(rows), after.take(rows)))
        again = stuck | (starting & ~fooled) | (after.changed == 0)
        after = replace(after, changed=torch.where(again, 0, after.changed))
        x = _without(batch, after)
        if again.any():
            x = torch.where(per_row(again, x), _noisy(batch, after.begun), x)
        return ending(batch, replace(after, x=x), k >= self.steps)


def _pass(batch: Batch, state: PointwiseState) -> PointwiseState:
    """Visit the changed features in a new order, in blocks half as large."""
    changed = (state.best != batch.x).flatten(1)
    count = changed.sum(1)
    order = noise.uniform(batch.key, changed.shape[1:], 2 * state.k + 1).masked_fill(~changed, 2.0).argsort(dim=1)
    size = (torch.where(state.changed == 0, count, state.size) + 1) // 2
    gained = torch.zeros_like(state.gained)
    return replace(state, order=order, changed=count, place=0 * count, size=size.clamp_min(1), gained=gained)


def _without(batch: Batch, state: PointwiseState) -> Tensor:
    """`best` with the features of the block on trial set back."""
    rank = torch.arange(state.order.shape[1], device=state.x.device)
    block = (rank >= state.place[:, None]) & (rank < (state.place + state.size)[:, None])
    back = torch.zeros_like(block).scatter(1, state.order, block).view_as(state.x)
    return torch.where(back, batch.x, state.best)


def _noisy(batch: Batch, begun: Tensor) -> Tensor:
    """Black and white noise on a share of the features; or what was given to start from, the first time."""
    draw = noise.uniform(batch.key, batch.x.shape[1:], 2 * begun)
    share = per_row(0.5 ** (_SHARES - 1 - begun % _SHARES).float(), draw)
    low, high = batch.threat.bounds
    x = torch.where(draw < share / 2, low, torch.where(draw < share, high, batch.x))
    return x if batch.start is None else torch.where(per_row(begun == 0, x), batch.start, x)
