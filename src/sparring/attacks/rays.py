"""RayS: labels alone, and a discrete search for the direction in which the boundary is nearest in Linf."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.attacks.hopskipjump import ending, fools
from sparring.core.attack import Observation, State
from sparring.core.batch import Batch, per_row
from sparring.core.model import Access


@dataclass(frozen=True)
class RaySState(State):
    """The best direction of each row, and the one on trial; `x` may lie outside the ball."""

    k: Tensor  # (n,) queries answered
    level: Tensor  # (n,) the features are cut into 2^level blocks
    block: Tensor  # (n,) the block on trial; -1: the first direction as it is
    signs: Tensor  # (n, c, h, w) int8, the best direction
    radius: Tensor  # (n,) float64 how far the boundary lies in it; beyond the bounds while it is not known
    low: Tensor  # (n,) float64 a radius that does not fool in the direction on trial
    high: Tensor  # (n,) float64 one that does, if `low` >= 0; -1 in `low`: not asked yet


@dataclass(frozen=True)
class RayS:
    """Flip the signs of a block; if `radius` still fools, halve the way to the boundary there and keep the flip.

    Chen and Gu 2020, algorithms 1 to 3: blocks of consecutive features, from the whole image to single features, and
    then single features over and over. The radius is found to `tolerance` of the range of the pixels.
    """

    steps: int = 5000
    tolerance: float = 1e-4

    name: ClassVar[str] = "rays"
    version: ClassVar[int] = 1
    needs: ClassVar[Access] = Access.DECISION
    norms: ClassVar[tuple[str, ...]] = ("linf",)
    paper: ClassVar[str] = "Chen and Gu 2020, arXiv:2006.12792"
    minimizes: ClassVar[bool] = True
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> RaySState:
        """Ask whether all features as high as they go will do."""
        zero = torch.zeros_like(batch.y)
        low, high = batch.threat.bounds
        signs = torch.ones_like(batch.x, dtype=torch.int8)
        most = torch.full_like(zero, high - low, dtype=torch.float64)
        x = _along(batch, signs, most)
        return RaySState(x, torch.zeros_like(batch.targeted), zero, zero, zero - 1, signs, most, 0 * most - 1, most)

    def step(self, batch: Batch, state: RaySState, seen: Observation) -> RaySState:
        """Halve the way on, or see to the next block."""
        fooled = fools(batch, seen)
        lowest, highest = batch.threat.bounds
        first = state.low < 0
        middle = (state.low + state.high) / 2
        low = torch.where(first, torch.where(fooled, 0.0, state.low), torch.where(fooled, state.low, middle))
        high = torch.where(first, state.radius, torch.where(fooled, middle, state.high))
        fits = high - low <= self.tolerance * (highest - lowest)
        over = (first & ~fooled) | fits
        trial = _flipped(state)
        signs = torch.where(per_row(fits, trial), trial, state.signs)
        radius = torch.where(fits, high, state.radius)
        size = _size(state)
        last = (state.block + 1) * size >= batch.x[0].numel()
        last = last | (state.block < 0)
        level = torch.where(over & last, state.level + (state.block >= 0), state.level)
        block = torch.where(over, torch.where(last, 0, state.block + 1), state.block)
        k, done = state.k + 1, state.k + 1 >= self.steps
        low = torch.where(over, -1.0, low)
        after = replace(state, k=k, level=level, block=block, signs=signs, radius=radius, low=low, high=high)
        ask = torch.where(over, radius, (low + high) / 2)
        return ending(batch, replace(after, x=_along(batch, _flipped(after), ask)), done)


def _size(state: RaySState) -> Tensor:
    """(n,) features in a block."""
    features = state.x[0].numel()
    return -(-features // 2 ** state.level.clamp_max(features.bit_length()))


def _flipped(state: RaySState) -> Tensor:
    """The best direction with the block on trial turned round."""
    place = torch.arange(state.x[0].numel(), device=state.x.device).view(1, *state.x.shape[1:])
    inside = place // per_row(_size(state), state.x) == per_row(state.block, state.x)
    return torch.where(inside, -state.signs, state.signs)


def _along(batch: Batch, signs: Tensor, radius: Tensor) -> Tensor:
    return batch.threat.clip(batch.x + per_row(radius.to(batch.x.dtype), signs) * signs)
