"""PGD_0: projected gradient descent that may change a few features only, each by any amount."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.core.attack import Observation, State
from sparring.core.batch import Batch
from sparring.core.losses import named
from sparring.core.model import Access

_REACH = 0.15  # of the pixel range, that the mean feature moves in a step


@dataclass(frozen=True)
class PGD0State(State):
    """PGD_0's place."""

    k: Tensor  # (n,) steps taken


@dataclass(frozen=True)
class PGD0:
    """x <- project(x + step gradient / ||gradient||_1) onto k features and the bounds.

    Croce and Hein 2019, PGD_0. It counts features (pixel x channel), as the L0 threat model does, where the paper
    counts pixels. `step_size` is the L1 length of a step before projection, in the units of the input; left out,
    it moves the mean feature by 0.15 of the pixel range, as the authors' 120000/255 on CIFAR-10 does.
    """

    steps: int = 100
    step_size: float | None = None
    random_start: bool = True
    loss: str = "cross_entropy"

    name: ClassVar[str] = "pgd0"
    version: ClassVar[int] = 1
    needs: ClassVar[Access] = Access.GRADIENT
    norms: ClassVar[tuple[str, ...]] = ("l0",)
    paper: ClassVar[str] = "Croce and Hein 2019, arXiv:1909.05040"
    minimizes: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> PGD0State:
        """Start at a random legal point, or at the clean image."""
        x = batch.threat.sample(batch.x, batch.key) if self.random_start else batch.x
        return PGD0State(x, torch.zeros_like(batch.targeted), torch.zeros_like(batch.y))

    def step(self, batch: Batch, state: PGD0State, seen: Observation) -> PGD0State:
        """Climb far, and keep the changes that matter most."""
        _, gradient = seen.value_and_grad(named(self.loss))
        flat = gradient.flatten(1)
        flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(1e-38)  # or tiny gradients lose their direction
        low, high = batch.threat.bounds
        size = _REACH * (high - low) * flat.shape[1] if self.step_size is None else self.step_size
        move = size * flat / flat.abs().sum(1, keepdim=True).clamp_min(1e-12)
        x = _nearest(batch, state.x + move.view_as(state.x))
        k = state.k + 1
        return replace(state, x=x, k=k, done=k >= self.steps)


def _nearest(batch: Batch, x: Tensor) -> Tensor:
    """The nearest legal points to `x`, which may lie far outside the bounds (`project` would clip first).

    A feature that would change by d, and by c within the bounds, brings x nearer by d^2 - (d - c)^2 = c (2 d - c).
    """
    clipped, origin = batch.threat.clip(x), batch.x
    change = (clipped - origin).flatten(1)
    gain = change * (2.0 * (x - origin).flatten(1) - change)
    place = gain.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return torch.where((place < min(batch.threat.eps, place.shape[1]) // 1).view_as(x), clipped, origin)
