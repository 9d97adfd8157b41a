"""SurFree: turn towards a random direction along the decision boundary, as far as it fools; labels only."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.attacks.hopskipjump import between, ending, fools, guess
from sparring.attacks.simba import cosines
from sparring.core import noise
from sparring.core.attack import Observation, State
from sparring.core.batch import Batch, per_row
from sparring.core.model import Access

_START, _HALVE, _SIGN, _EXTEND, _REFINE = range(5)
_HALVINGS, _REFINEMENTS = 10, 10
_ENOUGH = 0.01  # of 1 - cos, between an angle that fools and one that does not
_FARTHEST = 1.5  # radians: at pi / 2 the circle is back at the image


@dataclass(frozen=True)
class SurFreeState(State):
    """Each row's point and the circle it turns on; `x` may lie outside the ball, but the last point does not."""

    k: Tensor  # (n,) queries answered
    phase: Tensor  # (n,) what the next answer is for
    count: Tensor  # (n,) answers in this phase
    base: Tensor  # (n, c, h, w) the nearest point that fools
    way: Tensor  # (n, c, h, w) the direction to turn to: of length 1, across that to `base`
    theta: Tensor  # (n,) float64 radians: the first angle tried
    ask: Tensor  # (n,) float64 the angle asked about, with its sign; while halving, the share of the way
    low: Tensor  # (n,) float64 the largest angle that fools; while halving, the largest share that does not
    high: Tensor  # (n,) float64 the smallest that does not; while halving, the smallest that does


@dataclass(frozen=True)
class SurFree:
    """On a circle through the image and the nearest point found, look along a random direction for a nearer one.

    Maho, Furon and Le Merrer 2021, algorithm 1: both signs of `signs` angles from the largest down,
    then farther while it fools, then halving. Directions are noise on the lowest `share` of the cosines of
    either axis, taken across the way to the image; earlier directions are not remembered, as in many dimensions new
    ones lie across them anyway. The start is sought as HopSkipJump does.
    """

    steps: int = 2000
    angle: float = 30.0
    rho: float = 0.98
    signs: int = 1
    share: float = 1.0
    tries: int = 100

    name: ClassVar[str] = "surfree"
    version: ClassVar[int] = 1
    needs: ClassVar[Access] = Access.DECISION
    norms: ClassVar[tuple[str, ...]] = ("l2", "unbounded")
    paper: ClassVar[str] = "Maho et al. 2021, arXiv:2011.12807"
    minimizes: ClassVar[bool] = True
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> SurFreeState:
        """Ask about a first random image."""
        zero, share = torch.zeros_like(batch.y), torch.zeros_like(batch.y, dtype=torch.float64)
        x, none = guess(batch, zero), torch.zeros_like(batch.targeted)
        theta = share + math.radians(self.angle)
        return SurFreeState(x, none, zero, zero, zero, x, torch.zeros_like(x), theta, share, share, share)

    def step(self, batch: Batch, state: SurFreeState, seen: Observation) -> SurFreeState:
        """Learn from the answer; turn farther, less far, or to a new direction."""
        fooled, after = fools(batch, seen), replace(state, k=state.k + 1, count=state.count + 1)
        early = state.phase <= _HALVE
        for which, move in ((early, self._seek), (~early, self._turn)):
            rows = which.nonzero().squeeze(1)
            if len(rows) == len(early):
                after = move(batch, after, fooled)
            elif len(rows):
                after = after.put(rows, move(batch.take(rows), after.take(rows), fooled[rows]))
        lost = (after.phase == _START) & (after.k >= self.tries)
        return ending(batch, after, (after.k >= self.steps) | lost)

    def _seek(self, batch: Batch, state: SurFreeState, fooled: Tensor) -> SurFreeState:
        """Find a start, and halve the way from there to the boundary."""
        start = state.phase == _START
        low = torch.where(start | fooled, state.low, state.ask)
        high = torch.where(start, 1.0, torch.where(fooled, state.ask, state.high))
        phase = torch.where(start & ~fooled, _START, _HALVE)
        base = torch.where(per_row(start, state.x), state.x, state.base)
        found = ~start & (state.count >= _HALVINGS)
        base = torch.where(per_row(found, base), between(batch, base, high), base)
        ask = (low + high) / 2
        x = torch.where(per_row(phase == _HALVE, base), between(batch, base, ask), guess(batch, state.k))
        count = torch.where(start, 0, state.count)
        after = replace(state, x=x, phase=phase, count=count, base=base, ask=ask, low=low, high=high)
        return self._begin(batch, after, found)

    def _turn(self, batch: Batch, state: SurFreeState, fooled: Tensor) -> SurFreeState:
        """Look for an angle that fools, then for the largest."""
        sign, extend = state.phase == _SIGN, state.phase == _EXTEND
        more = state.ask.sign() * state.theta / self.signs
        low = torch.where(fooled, state.ask, state.low)
        high = torch.where(sign | (extend & fooled), state.ask + more, torch.where(fooled, state.high, state.ask))
        high = high.clamp(-_FARTHEST, _FARTHEST)
        # The first angles have no larger one that was asked about.
        onward = fooled & ((sign & (state.count <= 2)) | extend) & (high.abs() < _FARTHEST)
        failed = sign & ~fooled & (state.count >= 2 * self.signs)
        close = (low.cos() - high.cos()).abs() <= _ENOUGH
        ripe = (state.phase == _REFINE) & (state.count >= _REFINEMENTS)
        fine = ((fooled & sign) | ~sign) & ~onward & (close | ripe)
        base = torch.where(per_row(fine, state.base), turned(batch, state, low), state.base)
        theta = state.theta * torch.where(failed, self.rho, torch.where(fine, 1 / self.rho, 1.0))
        smaller = theta * (1 - (state.count // 2) / self.signs) * (1 - 2 * (state.count % 2))
        ask = torch.where(sign & ~fooled, smaller, torch.where(onward, high, (low + high) / 2))
        phase = torch.where(onward, _EXTEND, torch.where(sign & ~fooled, _SIGN, _REFINE))
        count = torch.where(phase == state.phase, state.count, 0)
        after = replace(state, phase=phase, count=count, base=base, theta=theta, ask=ask, low=low, high=high)
        after = replace(after, x=turned(batch, after, ask))
        return self._begin(batch, after, failed | fine)

    def _begin(self, batch: Batch, state: SurFreeState, fresh: Tensor) -> SurFreeState:
        """Let the rows that are `fresh` (n,) look along a new direction."""
        rows = fresh.nonzero().squeeze(1)
        if len(rows) == 0:
            return state
        some, own = state.take(rows), batch.take(rows)
        unit, _ = _towards(own, some.base)
        way = noise.normal(own.key, own.x.shape[1:], some.k)
        if self.share < 1:
            way = smooth(way, self.share)
        way = way - per_row((way * unit).flatten(1).sum(1), way) * unit
        way = way / per_row(way.flatten(1).norm(dim=1).clamp_min(1e-30), way)
        theta, zero = some.theta.clamp_max(_FARTHEST / 2), torch.zeros_like(some.count)
        some = replace(some, phase=zero + _SIGN, count=zero, way=way, theta=theta, ask=theta, low=0 * theta)
        return state.put(rows, replace(some, x=turned(own, some, theta)))


def turned(batch: Batch, state: SurFreeState, angle: Tensor) -> Tensor:
    """The point of the circle at an `angle` (n,), seen from the image, off `base` and towards `way`."""
    unit, length = _towards(batch, state.base)
    along, across = per_row(angle.cos().float(), unit), per_row(angle.sin().float(), unit)
    return batch.threat.clip(batch.x + per_row(length, unit) * along * (along * unit + across * state.way))


def smooth(way: Tensor, share: float) -> Tensor:
    """`way` (n, c, h, w) with the lowest `share` of its cosines left, along either axis."""
    # In float64, so that the order of a matrix product's sums cannot be seen in float32.
    down, across = (cosines(size, way.device) for size in way.shape[2:])
    down, across = (basis[: max(1, math.ceil(share * len(basis)))] for basis in (down, across))
    return (down.T @ (down @ way.double() @ across.T) @ across).to(way.dtype)


def _towards(batch: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
    """The direction from the images to `x`, of length 1, and the (n,) distances."""
    way = x - batch.x
    length = way.flatten(1).double().norm(dim=1).clamp_min(1e-30).float()
    return way / per_row(length, way), length
