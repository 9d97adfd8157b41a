"""Projected gradient descent: many small steps inside the ball."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.core.attack import Observation, State
from sparring.core.batch import Batch
from sparring.core.losses import named
from sparring.core.model import Access


@dataclass(frozen=True)
class PGDState(State):
    """PGD's place."""

    k: Tensor  # (n,) steps taken


@dataclass(frozen=True)
class PGD:
    """x <- project(x + step * steepest(gradient)): Madry et al. 2018, section 2.1.

    `step_size` is in the units of the input; left out, it is 2.5 eps / steps (their own tests in L2).
    """

    steps: int = 40
    step_size: float | None = None
    random_start: bool = True
    loss: str = "cross_entropy"

    name: ClassVar[str] = "pgd"
    version: ClassVar[int] = 1
    needs: ClassVar[Access] = Access.GRADIENT
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")
    paper: ClassVar[str] = "Madry et al. 2018, arXiv:1706.06083"
    minimizes: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> PGDState:
        """Start at a random legal point, or at the clean image."""
        x = batch.threat.sample(batch.x, batch.key) if self.random_start else batch.x
        return PGDState(x, torch.zeros_like(batch.targeted), torch.zeros_like(batch.y))

    def step(self, batch: Batch, state: PGDState, seen: Observation) -> PGDState:
        """Climb one step."""
        _, gradient = seen.value_and_grad(named(self.loss))
        size = 2.5 * batch.threat.eps / self.steps if self.step_size is None else self.step_size
        x = batch.project(torch.add(state.x, batch.threat.steepest(gradient, state.x), alpha=size))
        k = state.k + 1
        return replace(state, x=x, k=k, done=k >= self.steps)
