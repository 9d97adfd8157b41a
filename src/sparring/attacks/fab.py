"""FAB: walk along the decision boundary towards the clean image, from outside the ball if need be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.core.attack import Observation, State
from sparring.core.batch import Batch, per_row
from sparring.core.losses import named
from sparring.core.model import Access

_ROUNDS = 6  # of fixing the pixels that have reached a bound


@dataclass(frozen=True)
class FABState(State):
    """FAB's place; `x` may lie outside the ball, but the last point does not."""

    k: Tensor  # (n,) steps taken


@dataclass(frozen=True)
class FAB:
    """Step onto the linearised boundary, leaning towards the clean image; where the net is fooled, draw back too.

    Croce and Hein 2020, "Minimally distorted adversarial examples with a fast adaptive boundary attack",
    algorithm 1: its step with alpha_max and eta, and the backward step by beta, which here goes with the next
    step onto the boundary and so costs no look of its own. It finds its way where
    gradients vanish inside the ball and return beyond. Here it ends when a legal point fools, has one try,
    and takes no final search. Projections onto the plane and the bounds together are exact in L1, and in L2
    and Linf after at most six corrections for pixels at a bound, which are nearly always enough.
    """

    steps: int = 100
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    loss: str = "margin"

    name: ClassVar[str] = "fab"
    version: ClassVar[int] = 1
    needs: ClassVar[Access] = Access.GRADIENT
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")
    paper: ClassVar[str] = "Croce and Hein 2020, arXiv:1907.02044"
    minimizes: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> FABState:
        """Start at the clean image."""
        return FABState(batch.x, torch.zeros_like(batch.targeted), torch.zeros_like(batch.y))

    def step(self, batch: Batch, state: FABState, seen: Observation) -> FABState:
        """Draw back, or go on to the boundary."""
        value, gradient = seen.value_and_grad(named(self.loss))
        value = value.nan_to_num(0.0)
        origin, x = batch.x, state.x
        norm, bounds = batch.threat.norm, batch.threat.bounds
        behind = -value + (gradient * (x - origin)).flatten(1).sum(1)  # what is missing as seen from the clean image
        here, there = to_plane(norm, x, gradient, -value, bounds), to_plane(norm, origin, gradient, behind, bounds)
        near, far = batch.threat.length(here.flatten(1)), batch.threat.length(there.flatten(1))
        alpha = per_row((near / (near + far).clamp_min(1e-12)).clamp_max(self.alpha_max), x)
        onward = batch.threat.clip((1 - alpha) * (x + self.eta * here) + alpha * (origin + self.eta * there))
        fooled = seen.labels != batch.y if self.loss == "lead" else value > 0  # `lead` only says where to go
        x = torch.where(per_row(fooled, x), origin + self.beta * (onward - origin), onward)
        k = state.k + 1
        done = k >= self.steps
        if done.any():
            x = torch.where(per_row(done, x), batch.project(x), x)
        return replace(state, x=x, k=k, done=done)


def to_plane(norm: str, x: Tensor, gradient: Tensor, missing: Tensor, bounds: tuple[float, float]) -> Tensor:
    """The shortest change d of `x` (n, ...) with gradient . d = `missing` (n,) and x + d inside the bounds.

    Where the bounds leave no such change, the one that comes nearest.
    """
    flat = x.flatten(1)
    slope = gradient.flatten(1) * torch.where(missing < 0, -1.0, 1.0)[:, None].to(x.dtype)
    wanted = missing.abs().to(x.dtype)[:, None]
    reach = torch.where(slope > 0, bounds[1] - flat, bounds[0] - flat).masked_fill(slope == 0, 0.0)
    if norm == "l1":
        return _greedy(slope, reach, wanted).view_as(x)
    direction = slope if norm == "l2" else slope.sign()
    size, free = torch.zeros_like(wanted), slope != 0
    gain, cost, room = slope * reach, slope * direction, reach.abs() / direction.abs()  # room: NaN where 0 / 0
    for _ in range(_ROUNDS):
        loosened = free.to(slope.dtype)
        fixed = (gain * (1.0 - loosened)).sum(1, keepdim=True)
        loose = (cost * loosened).sum(1, keepdim=True)
        size = (wanted - fixed).clamp_min(0.0) / loose.clamp_min(1e-20)
        before, free = free, room > size
        if torch.equal(free, before):  # of a row that has settled nothing changes any more
            break
    return torch.where(free, size * direction, reach).view_as(x)


def _greedy(slope: Tensor, reach: Tensor, wanted: Tensor) -> Tensor:
    """In L1 the pixels with the steepest slope go all the way, one after the other."""
    order = slope.abs().argsort(dim=1, descending=True, stable=True)
    gain = (slope * reach).gather(1, order)
    before = gain.cumsum(1) - gain
    share = ((wanted - before) / gain.clamp_min(1e-20)).clamp(0.0, 1.0)
    return torch.zeros_like(slope).scatter(1, order, share * reach.gather(1, order))
