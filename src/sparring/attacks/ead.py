"""EAD: the nearest image under an elastic net, which changes few pixels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.core.attack import Observation, State
from sparring.core.batch import Batch, per_row
from sparring.core.losses import margin
from sparring.core.model import Access


@dataclass(frozen=True)
class EADState(State):
    """Where the search stands; `x` is y^(k) of the paper, the point with momentum."""

    k: Tensor  # (n,) steps taken in this search
    search: Tensor  # (n,) searches finished
    last: Tensor  # (n, c, h, w) x^(k)
    c: Tensor  # (n,) weight of the attack's loss
    low: Tensor  # (n,) the largest weight that was too small
    high: Tensor  # (n,) the smallest weight that fooled; inf: none yet
    fooled: Tensor  # (n,) bool: has this weight fooled?


@dataclass(frozen=True)
class EAD:
    """Minimise c max(-margin, -confidence) + ||d||_2^2 + beta ||d||_1 by FISTA, and search for the least c.

    Chen et al. 2018, algorithm 1: a gradient step on the smooth part, then shrinkage by `beta`
    and the bounds. The step falls from `step_size` to 0 as a square root. `steps` are those of one of the
    `searches` over c, which start at `weight`, multiply by ten until one fools, and then halve the interval. The
    authors take 9 searches from 0.001; the first of these seldom fool, and leave fewer steps to the others.
    """

    steps: int = 100
    searches: int = 6
    beta: float = 0.02
    step_size: float = 0.01
    weight: float = 10.0
    confidence: float = 0.0
    momentum: bool = True

    name: ClassVar[str] = "ead"
    version: ClassVar[int] = 2
    needs: ClassVar[Access] = Access.GRADIENT
    norms: ClassVar[tuple[str, ...]] = ("l1",)
    paper: ClassVar[str] = "Chen et al. 2018, arXiv:1709.04114"
    minimizes: ClassVar[bool] = True
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> EADState:
        """Start at the clean image."""
        zero, no = torch.zeros_like(batch.y), torch.zeros_like(batch.targeted)
        c = torch.full_like(zero, self.weight, dtype=torch.float32)
        low, high = torch.zeros_like(c), torch.full_like(c, torch.inf)
        return EADState(batch.x, no, zero, zero, batch.x, c, low, high, no)

    def step(self, batch: Batch, state: EADState, seen: Observation) -> EADState:
        """Descend, shrink, and go on along the last move; at the end of a search, take another weight."""
        value, gradient = seen.value_and_grad(margin)
        short = (value < self.confidence).to(gradient.dtype)
        descent = 2.0 * (state.x - batch.x) - per_row(state.c * short, gradient) * gradient
        size = self.step_size * (1.0 - state.k / self.steps).sqrt()
        x = self._shrink(batch, state.x - per_row(size, gradient) * descent)
        ahead = state.k / (state.k + 3.0) if self.momentum else torch.zeros_like(size)
        y = batch.threat.clip(x + per_row(ahead, x) * (x - state.last))
        far = (value > 0) & (batch.threat.distance(state.x, batch.x) > batch.threat.eps)
        k, fooled = state.k + 1, state.fooled | seen.adversarial | far
        after = self._next_weight(batch, replace(state, x=y, last=x, k=k, fooled=fooled))
        done = after.search >= self.searches
        if not done.any():
            return after
        return replace(after, x=torch.where(per_row(done, y), batch.project(y), after.x), done=done)

    def _shrink(self, batch: Batch, z: Tensor) -> Tensor:
        """Shrinkage: towards the clean image by `beta`, pixel by pixel, and into the bounds."""
        delta = z - batch.x
        return batch.threat.clip(batch.x + delta.sign() * (delta.abs() - self.beta).clamp_min(0.0))

    def _next_weight(self, batch: Batch, state: EADState) -> EADState:
        """The state after a search that is over: a smaller weight where it fooled, else a larger one."""
        over = state.k >= self.steps
        if not over.any():
            return state
        low = torch.where(state.fooled, state.low, state.c)
        high = torch.where(state.fooled, state.c, state.high)
        c = torch.where(high.isinf(), 10.0 * state.c, (low + high) / 2)
        rows = per_row(over, state.x)
        return replace(
            state,
            x=torch.where(rows, batch.x, state.x),
            last=torch.where(rows, batch.x, state.last),
            k=torch.where(over, 0, state.k),
            search=state.search + over,
            c=torch.where(over, c, state.c),
            low=torch.where(over, low, state.low),
            high=torch.where(over, high, state.high),
            fooled=state.fooled & ~over,
        )
