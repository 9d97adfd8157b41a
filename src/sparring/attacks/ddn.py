"""Decoupled direction and norm: the nearest image, in L2."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.core.attack import Observation, State
from sparring.core.batch import Batch, per_row
from sparring.core.losses import named
from sparring.core.model import Access


@dataclass(frozen=True)
class DDNState(State):
    """Where the search stands."""

    k: Tensor  # (n,) steps taken
    radius: Tensor  # (n,) the L2 norm that is tried next


@dataclass(frozen=True)
class DDN:
    """Shrink the L2 norm of the perturbation by `gamma` where it fools, else let it grow.

    Rony et al. 2019, algorithm 1. The step falls from `step_size` to a hundredth of it along a cosine.
    """

    steps: int = 300
    step_size: float = 1.0
    gamma: float = 0.05
    radius: float = 1.0
    loss: str = "cross_entropy"

    name: ClassVar[str] = "ddn"
    version: ClassVar[int] = 2
    needs: ClassVar[Access] = Access.GRADIENT
    norms: ClassVar[tuple[str, ...]] = ("l2", "unbounded")
    paper: ClassVar[str] = "Rony et al. 2019, arXiv:1811.09600"
    minimizes: ClassVar[bool] = True
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> DDNState:
        """Start at the clean image with a radius of `radius`."""
        k = torch.zeros_like(batch.y)
        return DDNState(
            batch.x, torch.zeros_like(batch.targeted), k, torch.full_like(k, self.radius, dtype=torch.float32)
        )

    def step(self, batch: Batch, state: DDNState, seen: Observation) -> DDNState:
        """Move along the gradient, then onto the sphere of the new radius."""
        _, gradient = seen.value_and_grad(named(self.loss))
        low = self.step_size * 0.01
        size = low + (self.step_size - low) * (1 + torch.cos(math.pi * state.k / self.steps)) / 2
        delta = state.x - batch.x + per_row(size, state.x) * batch.threat.steepest(gradient)
        factor = torch.where(seen.adversarial, 1 - self.gamma, 1 + self.gamma)
        radius = state.radius * factor
        length = delta.flatten(1).norm(dim=1).clamp_min(1e-12)
        x = batch.project(batch.x + delta * per_row(radius / length, delta))
        k = state.k + 1
        return replace(state, x=x, k=k, radius=radius, done=k >= self.steps)
