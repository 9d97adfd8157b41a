"""Fast minimum-norm: the nearest image in Linf, L2, L1 or L0, by gradient steps inside a ball that adapts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.core.attack import Observation, State
from sparring.core.batch import Batch
from sparring.core.losses import named
from sparring.core.model import Access

_DUALS = {"linf": 1.0, "l2": 2.0, "l1": math.inf}
_LEAST = 0.001  # gamma in the end
_BEYOND = 1e-5  # of the pixel range, past the boundary where it is straight: on it there is a tie, for ever


@dataclass(frozen=True)
class FMNState(State):
    """Where the search stands."""

    k: Tensor  # (n,) steps taken
    radius: Tensor  # (n,) float64 epsilon: how far from the clean image the next point may lie
    nearest: Tensor  # (n,) float64 distance of the nearest point that fooled; inf before the first


@dataclass(frozen=True)
class FMN:
    """Climb the margin inside a ball that shrinks by gamma where the model is fooled, and grows where it is not.

    Pintor et al. 2021, algorithm 1: before the first success epsilon is the distance to the linearised boundary,
    and here a thousandth more, or nets of straight pieces would be left at a tie; `step_size` (to a hundredth) and
    `gamma` (to 0.001) fall along a cosine. In L0 epsilon changes by one feature at least. The step has that L2 length
    in every norm. The point is the nearest one of ball and bounds together, and the ball is never wider than the
    threat model's.
    """

    steps: int = 300
    step_size: float = 1.0
    gamma: float = 0.05
    loss: str = "margin"

    name: ClassVar[str] = "fmn"
    version: ClassVar[int] = 2
    needs: ClassVar[Access] = Access.GRADIENT
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1", "l0")
    paper: ClassVar[str] = "Pintor et al. 2021, arXiv:2102.12827"
    minimizes: ClassVar[bool] = True
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> FMNState:
        """Start at the clean image."""
        radius = torch.zeros(len(batch.x), dtype=torch.float64, device=batch.x.device)
        done, k = torch.zeros_like(batch.targeted), torch.zeros_like(batch.y)
        return FMNState(batch.x, done, k, radius, torch.full_like(radius, torch.inf))

    def step(self, batch: Batch, state: FMNState, seen: Observation) -> FMNState:
        """Fit the ball, climb, and come back into it."""
        value, gradient = seen.value_and_grad(named(self.loss))
        low, high = batch.threat.bounds
        flat = gradient.flatten(1).double()
        falling = (1 + torch.cos(math.pi * state.k / self.steps).double()) / 2
        size = self.step_size * (0.01 + 0.99 * falling)
        gamma = _LEAST + (self.gamma - _LEAST) * falling
        length = batch.threat.distance(state.x, batch.x)
        nearest = torch.where(seen.adversarial, length.minimum(state.nearest), state.nearest)
        if batch.threat.norm == "l0":
            less = (state.radius * (1 - gamma)).floor().minimum(state.radius - 1).clamp_min(1.0)
            more = (state.radius * (1 + gamma)).floor().maximum(state.radius + 1)
        else:
            slope = flat.norm(_DUALS[batch.threat.norm], dim=1)
            reach = length + torch.where(slope > 0, value.double().abs() / slope, torch.inf)
            edge = (1 + _LEAST) * reach + _BEYOND * (high - low)
            less = state.radius * (1 - gamma)
            more = torch.where(nearest < torch.inf, state.radius * (1 + gamma), edge)
        corner = torch.maximum(batch.x - low, high - batch.x)  # beyond the farthest image there is nothing
        most = batch.threat.length(corner.double().flatten(1)).clamp_max(batch.threat.eps)
        radius = torch.where(seen.adversarial, less.minimum(nearest), more).minimum(most)
        unit = flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-300)
        ahead = state.x + (unit * size[:, None]).to(state.x.dtype).view_as(state.x)
        x = batch.threat.within(ahead, batch.x, radius.to(batch.x.dtype))
        k = state.k + 1
        return replace(state, x=x, k=k, done=k >= self.steps, radius=radius, nearest=nearest)
