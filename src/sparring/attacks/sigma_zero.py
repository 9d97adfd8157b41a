"""Sigma-zero: the image that differs in the fewest features, by gradients of a smooth count."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.core.attack import Observation, State
from sparring.core.batch import Batch, per_row
from sparring.core.losses import margin
from sparring.core.model import Access


@dataclass(frozen=True)
class SigmaZeroState(State):
    """Where the descent stands."""

    k: Tensor  # (n,) steps taken
    threshold: Tensor  # (n,) changes smaller than this are undone
    first: Tensor  # (n, c, h, w) Adam's mean of the gradients
    second: Tensor  # (n, c, h, w) Adam's mean of their squares


@dataclass(frozen=True)
class SigmaZero:
    """Descend max(-margin, 0) + sum d^2 / (d^2 + sigma) / size, and undo the small changes after each step.

    Cina et al. 2025, algorithm 1: the gradient is divided by its largest entry, the step falls
    from `step_size` to a tenth of it along a cosine, and the threshold below which changes are undone grows by
    `pace` times the step where the point fools and falls by as much where not. Changes d are in units of the pixel
    range. As in the authors' code the step is Adam's; `adam=False` takes the plain one.
    """

    steps: int = 1000
    step_size: float = 1.0
    sigma: float = 0.001
    threshold: float = 0.3
    pace: float = 0.01
    adam: bool = True

    name: ClassVar[str] = "sigma_zero"
    version: ClassVar[int] = 1
    needs: ClassVar[Access] = Access.GRADIENT
    norms: ClassVar[tuple[str, ...]] = ("l0",)
    paper: ClassVar[str] = "Cina et al. 2025, arXiv:2402.01879"
    minimizes: ClassVar[bool] = True
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> SigmaZeroState:
        """Start at the clean image."""
        k, nothing = torch.zeros_like(batch.y), torch.zeros_like(batch.x)
        threshold = torch.full_like(k, self.threshold, dtype=torch.float32)
        return SigmaZeroState(batch.x, torch.zeros_like(batch.targeted), k, threshold, nothing, nothing)

    def step(self, batch: Batch, state: SigmaZeroState, seen: Observation) -> SigmaZeroState:
        """Descend, clip, and undo what is small."""
        value, gradient = seen.value_and_grad(margin)
        low, high = batch.threat.bounds
        delta = (state.x - batch.x) / (high - low)
        square = delta.square()
        count = 2.0 * self.sigma * delta / (square + self.sigma).square() / delta[0].numel()
        slope = count - per_row((value < 0).to(count.dtype), count) * gradient * (high - low)
        slope = slope / slope.flatten(1).abs().amax(1).clamp_min(1e-12).view(-1, 1, 1, 1)
        k = state.k + 1
        first, second, move = self._adam(state, slope, k)
        size = self.step_size * (0.55 + 0.45 * torch.cos(math.pi * state.k / self.steps))
        x = batch.threat.clip(state.x - per_row(size, move) * move * (high - low))
        # Beyond eps the judge says no, yet there is enough change there: the threshold is to grow.
        far = (value > 0) & (batch.threat.distance(state.x, batch.x) > batch.threat.eps)
        pace = torch.where(seen.adversarial | far, self.pace, -self.pace) * size
        threshold = (state.threshold + pace).clamp(0.0, 1.0)
        small = (x - batch.x).abs() < per_row(threshold, x) * (high - low)
        x = torch.where(small, batch.x, x)
        done = k >= self.steps
        if done.any():
            x = torch.where(per_row(done, x), batch.project(x), x)
        return replace(state, x=x, k=k, done=done, threshold=threshold, first=first, second=second)

    def _adam(self, state: SigmaZeroState, slope: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Adam's two means after this gradient, and its step (Kingma and Ba 2015, algorithm 1)."""
        if not self.adam:
            return state.first, state.second, slope
        first = 0.9 * state.first + 0.1 * slope
        second = 0.999 * state.second + 0.001 * slope.square()
        mean, spread = first / per_row(1 - 0.9**k, slope), second / per_row(1 - 0.999**k, slope)
        return first, second, mean / (spread.sqrt() + 1e-8)
