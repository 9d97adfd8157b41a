"""The basic iterative method: small steps from the clean image, never outside the ball."""

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
class BIMState(State):
    """BIM's place."""

    k: Tensor  # (n,) steps taken


@dataclass(frozen=True)
class BIM:
    """x <- project(x + step * steepest(gradient)) from the clean image: Kurakin et al. 2017, section 2.2.

    `step_size` is in the units of the input; left out, it is 1.25 eps / steps, which is how far the paper's
    1.25 eps steps of one grey level go. With a target it is the paper's iterative method of section 2.3.
    """

    steps: int = 10
    step_size: float | None = None
    loss: str = "cross_entropy"

    name: ClassVar[str] = "bim"
    version: ClassVar[int] = 1
    needs: ClassVar[Access] = Access.GRADIENT
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    paper: ClassVar[str] = "Kurakin et al. 2017, arXiv:1607.02533"
    minimizes: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> BIMState:
        """Start at the clean image."""
        return BIMState(batch.x, torch.zeros_like(batch.targeted), torch.zeros_like(batch.y))

    def step(self, batch: Batch, state: BIMState, seen: Observation) -> BIMState:
        """Climb one step."""
        _, gradient = seen.value_and_grad(named(self.loss))
        size = 1.25 * batch.threat.eps / self.steps if self.step_size is None else self.step_size
        x = batch.project(state.x + size * batch.threat.steepest(gradient))
        k = state.k + 1
        return replace(state, x=x, k=k, done=k >= self.steps)
