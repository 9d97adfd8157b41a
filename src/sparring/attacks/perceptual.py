"""The image that looks most alike and still fools: an augmented Lagrangian of the structural similarity."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.core import noise
from sparring.core.attack import Observation, State
from sparring.core.batch import Batch, per_row
from sparring.core.losses import margin
from sparring.core.model import Access

_MOST = 1e12  # the largest multiplier, as in the authors' code; the smallest is 1e-6


@dataclass(frozen=True)
class PerceptualState(State):
    """Where the descent stands, and how much the constraint weighs."""

    k: Tensor  # (n,) steps taken
    won: Tensor  # (n,) the step at which it first fooled; `steps` + 1 before that
    rate: Tensor  # (n,) float64 the step size at first, found by the first step
    square: Tensor  # (n, c, h, w) running mean of the squared gradient
    momentum: Tensor  # (n, c, h, w) running sum of scaled gradients
    mu: Tensor  # (n,) float64 the multiplier
    rho: Tensor  # (n,) float64 the penalty parameter
    checked: Tensor  # (n,) float64 the constraint when it was last checked


@dataclass(frozen=True)
class Perceptual:
    """Descend distance(x) + P(g(x)), where g <= 0 says that x fools: ALMA, with 1 - SSIM for the distance.

    Rony et al. 2021, algorithm 1, with the penalty P2, their scaled margin, and RMSProp with momentum. The
    multiplier mu follows P'(g) with inertia `alpha`; the penalty parameter rho grows by `gamma` when within `check`
    steps a row that never fooled has not brought g down to `tau` of what it was. The first step is as long as to
    change the distance by `first`; from the first success on steps shrink exponentially to `shrink` of that. There
    they are 1e-4 and 0.01, for 1000 steps; longer steps come as near in 300. `margin` is how far beyond the boundary
    a point is to be. Everything is in units of the pixel range, so that the bounds do not matter.
    """

    steps: int = 300
    first: float = 0.01
    alpha: float = 0.9
    gamma: float = 1.2
    tau: float = 0.95
    check: int = 10
    shrink: float = 0.03
    margin: float = 1e-4

    name: ClassVar[str] = "perceptual"
    version: ClassVar[int] = 1
    needs: ClassVar[Access] = Access.GRADIENT
    norms: ClassVar[tuple[str, ...]] = ("ssim",)
    paper: ClassVar[str] = "Rony et al. 2021, arXiv:2011.11857"
    minimizes: ClassVar[bool] = True
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> PerceptualState:
        """Start at the clean image, with a multiplier and a penalty parameter of 1."""
        k, zero = torch.zeros_like(batch.y), torch.zeros_like(batch.x)
        one = torch.ones_like(k, dtype=torch.float64)
        return PerceptualState(
            batch.x, torch.zeros_like(batch.targeted), k, torch.full_like(k, self.steps + 1), one,
            torch.ones_like(zero), zero, one, one, one,
        )  # fmt: skip

    def step(self, batch: Batch, state: PerceptualState, seen: Observation) -> PerceptualState:
        """One step of descent; the multiplier is updated before it."""
        value, climb = seen.value_and_grad(scaled_margin)
        g = self.margin - value.double().nan_to_num(0.0, 0.0, 0.0)
        new, k = state.k == 0, state.k + 1
        due = ~new & (k % self.check == 0)
        never = state.won > self.steps
        rho = torch.where(due & never & (g >= self.tau * state.checked), self.gamma * state.rho, state.rho)
        mu = (self.alpha * state.mu + (1 - self.alpha) * _slope(g, rho, state.mu)).clamp(1e-6, _MOST)
        mu = torch.where(new, state.mu, mu)
        won = torch.where(never & (g < 0), state.k, state.won)
        near = torch.where(per_row(new, climb), 0.0, _away(batch, state.x))  # 0 at the image itself but for rounding
        gradient = _extent(batch) * (near - climb * per_row(_slope(g, rho, mu), climb))
        rate = state.rate
        if new.any():
            gradient = torch.where(per_row(new, climb), _somewhere(batch, gradient), gradient)
            rate = torch.where(new, _rate(batch, gradient, self.first), rate)
        shrunk = rate * self.shrink ** ((state.k - won).clamp_min(0) / (self.steps - won))
        square = self.alpha * state.square + (1 - self.alpha) * gradient.square()
        momentum = self.alpha * state.momentum + gradient / (square.sqrt() + 1e-8)
        x = batch.threat.clip((state.x - _extent(batch) * per_row(shrunk, gradient) * momentum).to(state.x.dtype))
        done = k >= self.steps
        if done.any():
            x = torch.where(per_row(done, x), batch.project(x), x)
        checked = torch.where(due | new, g, state.checked)
        return replace(
            state, x=x, done=done, k=k, won=won, rate=rate, square=square.to(x.dtype), momentum=momentum.to(x.dtype),
            mu=mu, rho=rho, checked=checked,
        )  # fmt: skip


def scaled_margin(logits: Tensor, batch: Batch) -> Tensor:
    """The margin over z_1 - z_3, or with a target over z_1 - (z_3 + z_4) / 2; with two classes, the margin."""
    if logits.shape[1] < 3:
        return margin(logits, batch)
    top = logits.topk(min(4, logits.shape[1]), dim=1).values
    third = torch.where(batch.targeted, (top[:, 2] + top[:, -1]) / 2, top[:, 2])
    return margin(logits, batch) / (top[:, 0] - third + 1e-8)


def _slope(g: Tensor, rho: Tensor, mu: Tensor) -> Tensor:
    """(n,) dP/dg of the penalty P2: mu g + mu rho g^2 + rho^2 g^3 / 6 for g >= 0, else mu g / (1 - rho g)."""
    above = mu + 2 * mu * rho * g + (rho * g).square() / 2
    return torch.where(g >= 0, above, mu / (1 - rho * g.clamp_max(0)).square())


def _extent(batch: Batch) -> float:
    low, high = batch.threat.bounds
    return high - low


def _away(batch: Batch, x: Tensor) -> Tensor:
    """(n, c, h, w) float64: the gradient of the distance."""
    with torch.enable_grad():
        leaf = x.detach().double().requires_grad_()
        (gradient,) = torch.autograd.grad(batch.threat.distance(leaf, batch.x).sum(), leaf)
    return gradient


def _somewhere(batch: Batch, gradient: Tensor) -> Tensor:
    """The gradient, or where that is nil a random direction."""
    way = noise.normal(batch.key, batch.x.shape[1:]).to(gradient.dtype)
    way = way / per_row(way.flatten(1).norm(dim=1), way)
    return torch.where(per_row(gradient.flatten(1).norm(dim=1) <= 1e-6, way), way, gradient)


def _rate(batch: Batch, gradient: Tensor, distance: float) -> Tensor:
    """(n,) float64: how far down the gradient the distance is reached, by doubling and then halving."""

    def beyond(rate: Tensor) -> Tensor:
        x = batch.threat.clip(batch.x - _extent(batch) * per_row(rate, gradient) * gradient)
        return batch.threat.distance(x, batch.x) > distance

    low = torch.zeros_like(batch.y, dtype=torch.float64)
    high = torch.full_like(low, 2.0**-10)
    for _ in range(40):
        outside = beyond(high)
        low, high = torch.where(outside, low, high), torch.where(outside, high, 2 * high)
    for _ in range(20):
        middle = (low + high) / 2
        outside = beyond(middle)
        low, high = torch.where(outside, low, middle), torch.where(outside, middle, high)
    return (low + high) / 2
