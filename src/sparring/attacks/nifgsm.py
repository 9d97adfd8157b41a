"""NI-FGSM: momentum that looks ahead to where it will carry the image, and takes the gradient there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.attacks.mifgsm import normalised
from sparring.core.attack import Observation, State
from sparring.core.batch import Batch, per_row
from sparring.core.losses import named
from sparring.core.model import Access


@dataclass(frozen=True)
class NIFGSMState(State):
    """NI-FGSM's place; `x` lies ahead of it and may be outside the ball, but the last one is the place itself."""

    k: Tensor  # (n,) steps taken
    place: Tensor  # (n, c, h, w) x_t of the paper
    velocity: Tensor  # (n, c, h, w) the normalised gradients so far, older ones fading


@dataclass(frozen=True)
class NIFGSM:
    """g <- momentum g + gradient(x + step momentum g) / ||.||_1; x <- project(x + step sign(g)).

    Lin et al. 2020, section 3, NI-FGSM. The point ahead is clipped to the pixel range; `step_size` left out is
    eps / steps.
    """

    steps: int = 10
    step_size: float | None = None
    momentum: float = 1.0
    loss: str = "cross_entropy"

    name: ClassVar[str] = "nifgsm"
    version: ClassVar[int] = 1
    needs: ClassVar[Access] = Access.GRADIENT
    norms: ClassVar[tuple[str, ...]] = ("linf",)
    paper: ClassVar[str] = "Lin et al. 2020, arXiv:1908.06281"
    minimizes: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> NIFGSMState:
        """Start at the clean image, at rest."""
        x, rest = batch.x, torch.zeros_like(batch.x)
        return NIFGSMState(x, torch.zeros_like(batch.targeted), torch.zeros_like(batch.y), x, rest)

    def step(self, batch: Batch, state: NIFGSMState, seen: Observation) -> NIFGSMState:
        """Add the gradient found ahead, move, and look ahead again."""
        _, gradient = seen.value_and_grad(named(self.loss))
        size = batch.threat.eps / self.steps if self.step_size is None else self.step_size
        velocity = self.momentum * state.velocity + normalised(gradient)
        place = batch.project(state.place + size * batch.threat.steepest(velocity))
        ahead = batch.threat.clip(place + size * self.momentum * velocity)
        k = state.k + 1
        done = k >= self.steps
        x = torch.where(per_row(done, place), place, ahead)
        return replace(state, x=x, k=k, place=place, velocity=velocity, done=done)
