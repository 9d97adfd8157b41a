"""The classic attack by gradient descent on the input, from noise, with or without a picture to stay near."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.core import noise
from sparring.core.attack import Observation, State
from sparring.core.batch import Batch
from sparring.core.losses import named
from sparring.core.model import Access


@dataclass(frozen=True)
class FoolingState(State):
    """Where the descent stands."""

    k: Tensor  # (n,) steps taken


@dataclass(frozen=True)
class Fooling:
    """Descend C = 1/2 ||y_goal - y(x)||^2 + lam ||x - x_target||^2 from Gaussian noise.

    With lam = 0, noise to a person is the goal to the network; with lam > 0 a person sees the picture
    x_target, which is the batch's image. The noise has mean 1/2 and deviation 0.3 of the pixel range. A step
    has the L2 length `step_size`, along the gradient of C, however small that gradient is. `loss` is the
    first term: `quadratic` is the classic one, `tempered` the same at a temperature at which it never stalls.
    """

    steps: int = 500
    lam: float = 0.0
    step_size: float = 0.3
    loss: str = "tempered"

    name: ClassVar[str] = "fooling"
    version: ClassVar[int] = 1
    needs: ClassVar[Access] = Access.GRADIENT
    norms: ClassVar[tuple[str, ...]] = ("unbounded",)
    paper: ClassVar[str] = "gradient descent on the input; cf. Nguyen et al. 2015, arXiv:1412.1897"
    needs_target: ClassVar[bool] = True

    @property
    def minimizes(self) -> bool:
        """With a picture to stay near, the nearest point counts, not the first."""
        return self.lam > 0

    def init(self, batch: Batch) -> FoolingState:
        """Start from noise."""
        low, high = batch.threat.bounds
        gaussian = noise.normal(batch.key, batch.x.shape[1:])
        x = batch.threat.clip((low + high) / 2 + 0.3 * (high - low) * gaussian)
        return FoolingState(x, torch.zeros_like(batch.targeted), torch.zeros_like(batch.y))

    def step(self, batch: Batch, state: FoolingState, seen: Observation) -> FoolingState:
        """Descend the whole cost by one step of fixed length."""
        _, climb = seen.value_and_grad(named(self.loss))
        downhill = batch.threat.steepest(climb - 2.0 * self.lam * (state.x - batch.x))
        x = batch.threat.clip(state.x + self.step_size * downhill)
        k = state.k + 1
        return replace(state, x=x, k=k, done=k >= self.steps)
