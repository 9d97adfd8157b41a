"""The Boundary attack: a random walk along the decision boundary, towards the image, that asks for labels only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.attacks.hopskipjump import between, ending, fools, guess
from sparring.core import noise
from sparring.core.attack import Observation, State
from sparring.core.batch import Batch, per_row
from sparring.core.model import Access

_START, _HALVE, _SPHERE, _WALK = range(4)
_HALVINGS = 10
_WIDEST = 0.5  # of the distance, for both steps


@dataclass(frozen=True)
class BoundaryState(State):
    """Where each row walks, and how far it steps; `x` may lie outside the ball, but the last point does not."""

    k: Tensor  # (n,) queries answered
    phase: Tensor  # (n,) what the next answer is for
    count: Tensor  # (n,) answers in this phase: halvings, and then steps
    best: Tensor  # (n, c, h, w) the nearest point that fools
    low: Tensor  # (n,) float64 share of the way to `best` that does not fool, while halving
    high: Tensor  # (n,) float64 one that does
    aside: Tensor  # (n,) float64 length of the next step along the sphere, over the distance
    inward: Tensor  # (n,) float64 length of the next step towards the image, over the distance


@dataclass(frozen=True)
class Boundary:
    """Step aside on the sphere around the image, then inwards; stay there if it fools.

    Brendel et al. 2018, section 2 (figure 2). The step aside grows where it alone fools more than half of the
    time, which every `check`-th query finds out, and the step inwards where both together fool more than a
    quarter of the time; both by factors at every answer instead of windows. The start is sought as HopSkipJump
    does, and the way from there to the boundary is halved first.
    """

    steps: int = 5000
    aside: float = 0.1
    inward: float = 0.02
    check: int = 10
    tries: int = 100

    name: ClassVar[str] = "boundary"
    version: ClassVar[int] = 1
    needs: ClassVar[Access] = Access.DECISION
    norms: ClassVar[tuple[str, ...]] = ("l2", "unbounded")
    paper: ClassVar[str] = "Brendel et al. 2018, arXiv:1712.04248"
    minimizes: ClassVar[bool] = True
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> BoundaryState:
        """Ask about a first random image."""
        zero = torch.zeros_like(batch.y)
        share, x = zero.double(), guess(batch, zero)
        none = torch.zeros_like(batch.targeted)
        return BoundaryState(x, none, zero, zero, zero, x, share, share, share + self.aside, share + self.inward)

    def step(self, batch: Batch, state: BoundaryState, seen: Observation) -> BoundaryState:
        """Learn from the answer, and propose the next point."""
        fooled, phase = fools(batch, seen), state.phase
        start, halve, sphere, walk = (phase == each for each in (_START, _HALVE, _SPHERE, _WALK))
        middle = (state.low + state.high) / 2
        low = torch.where(halve & ~fooled, middle, state.low)
        high = torch.where(start, 1.0, torch.where(halve & fooled, middle, state.high))
        moved = fooled & (start | walk | halve)
        best = torch.where(per_row(fooled & (start | walk), state.x), state.x, state.best)
        found = halve & (state.count + 1 >= _HALVINGS)
        reached = between(batch, best, high) if found.any() else best
        best = torch.where(per_row(found, best), reached, best)
        aside = state.aside * torch.where(sphere, torch.where(fooled, 1.5, 1 / 1.5), 1.0)
        inward = state.inward * torch.where(walk, torch.where(fooled, 1.15**3, 1 / 1.15), 1.0)
        count = torch.where((start & moved) | found, 0, state.count + 1)
        ripe = (count % self.check == 0) & ~sphere  # a check is followed by a step
        phase = torch.where(start, torch.where(fooled, _HALVE, _START), torch.where(halve, _HALVE, _WALK))
        phase = torch.where(found | ((phase == _WALK) & ripe), _SPHERE, phase)
        k = state.k + 1
        after = replace(state, k=k, phase=phase, count=count, best=best, low=low, high=high)
        after = replace(after, aside=aside.clamp_max(_WIDEST), inward=inward.clamp_max(_WIDEST))
        return ending(batch, self._ask(batch, after), (k >= self.steps) | ((phase == _START) & (k >= self.tries)))

    def _ask(self, batch: Batch, state: BoundaryState) -> BoundaryState:
        x = step_aside(batch, state)
        halve, start = state.phase == _HALVE, state.phase == _START
        if halve.any():
            x = torch.where(per_row(halve, x), between(batch, state.best, (state.low + state.high) / 2), x)
        if start.any():
            x = torch.where(per_row(start, x), guess(batch, state.k), x)
        return replace(state, x=x)


def step_aside(batch: Batch, state: BoundaryState) -> Tensor:
    """A random point at the distance of `best`, nearly as near to `best`; then inwards, unless only to check."""
    way = state.best - batch.x
    length = way.flatten(1).double().norm(dim=1).clamp_min(1e-30)
    unit = way / per_row(length.float(), way)
    turn = noise.normal(batch.key, batch.x.shape[1:], state.k)
    turn = turn - per_row((turn * unit).flatten(1).sum(1), turn) * unit
    turn = turn / turn.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None, None, None]
    inward = torch.where(state.phase == _SPHERE, 0.0, state.inward)
    size = length * (1 - inward) / (1 + state.aside.square()).sqrt()
    return batch.threat.clip(batch.x + per_row(size.float(), way) * (unit + per_row(state.aside.float(), way) * turn))
