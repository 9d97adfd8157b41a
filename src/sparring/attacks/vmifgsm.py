"""VMI-FGSM: each gradient is corrected by how much it differed from those around the place before."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.attacks.mifgsm import normalised
from sparring.core import noise
from sparring.core.attack import Observation, State
from sparring.core.batch import Batch, per_row
from sparring.core.errors import UsageError
from sparring.core.losses import named
from sparring.core.model import Access


@dataclass(frozen=True)
class VMIFGSMState(State):
    """VMI-FGSM's place; `x` is the place itself or a neighbour, which need not be in the ball."""

    k: Tensor  # (n,) steps taken
    asked: Tensor  # (n,) which neighbour is asked about; 0: the place itself
    place: Tensor  # (n, c, h, w) x_t of the paper
    velocity: Tensor  # (n, c, h, w) the corrected, normalised gradients so far, older ones fading
    gradient: Tensor  # (n, c, h, w) at the place
    total: Tensor  # (n, c, h, w) of the gradients at its neighbours so far
    variance: Tensor  # (n, c, h, w) v_t of the paper, from the place before


@dataclass(frozen=True)
class VMIFGSM:
    """MI-FGSM with gradient + v, where v is the mean gradient of neighbours less that of the place: Wang and He 2021.

    Algorithm 1 there; v comes from the place before, whose `neighbours` are drawn evenly from a cube of `beta` eps
    around it, and clipped to the pixel range. A step takes 1 + `neighbours` queries, but the last takes one, since
    no later one needs its v. `step_size` left out is eps / steps.
    """

    steps: int = 10
    step_size: float | None = None
    momentum: float = 1.0
    neighbours: int = 20
    beta: float = 1.5
    loss: str = "cross_entropy"

    name: ClassVar[str] = "vmifgsm"
    version: ClassVar[int] = 1
    needs: ClassVar[Access] = Access.GRADIENT
    norms: ClassVar[tuple[str, ...]] = ("linf",)
    paper: ClassVar[str] = "Wang and He 2021, arXiv:2103.15571"
    minimizes: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse a mean over nothing."""
        if self.neighbours < 1:
            raise UsageError(f"expected at least 1 neighbour, got {self.neighbours}; without any it is mifgsm")

    def init(self, batch: Batch) -> VMIFGSMState:
        """Start at the clean image, at rest, with nothing to correct."""
        x, rest, zero = batch.x, torch.zeros_like(batch.x), torch.zeros_like(batch.y)
        return VMIFGSMState(x, torch.zeros_like(batch.targeted), zero, zero, x, rest, rest, rest, rest)

    def step(self, batch: Batch, state: VMIFGSMState, seen: Observation) -> VMIFGSMState:
        """Add the place's corrected gradient, or a neighbour's to the mean; after the last neighbour, move."""
        _, found = seen.value_and_grad(named(self.loss))
        size = batch.threat.eps / self.steps if self.step_size is None else self.step_size
        home = per_row(state.asked == 0, found)
        added = self.momentum * state.velocity + normalised(found + state.variance)
        velocity = torch.where(home, added, state.velocity)
        gradient = torch.where(home, found, state.gradient)
        total = torch.where(home, 0.0, state.total + found)
        leave = (state.asked >= self.neighbours) | (state.k + 1 >= self.steps)
        rows = per_row(leave, found)
        onward = batch.project(state.place + size * batch.threat.steepest(velocity))
        place = torch.where(rows, onward, state.place)
        variance = torch.where(rows, total / self.neighbours - gradient, state.variance)
        k, asked = state.k + leave, torch.where(leave, 0, state.asked + 1)
        x = torch.where(rows, place, self._neighbour(batch, place, k * self.neighbours + asked))
        return replace(
            state, x=x, done=k >= self.steps, k=k, asked=asked, place=place, velocity=velocity, gradient=gradient,
            total=total, variance=variance,
        )  # fmt: skip

    def _neighbour(self, batch: Batch, place: Tensor, stream: Tensor) -> Tensor:
        draw = noise.uniform(batch.key, place.shape[1:], stream)
        return batch.threat.clip(place + self.beta * batch.threat.eps * (2.0 * draw - 1.0))
