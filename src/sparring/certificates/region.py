"""Where the images of a threat model lie, and the least value of a linear function there."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.core.batch import Rows
from sparring.core.errors import UsageError
from sparring.core.threat import L2, Linf, Threat, Unbounded


@dataclass(frozen=True)
class Region(Rows):
    """The box [low, high] of each row, cut with the ball of `radius` around `x` (Euclidean) if there is one."""

    x: Tensor  # (n, *shape) the images
    low: Tensor  # (n, *shape)
    high: Tensor
    radius: float | None = None

    def to(self, dtype: torch.dtype) -> Region:
        """In `dtype`, rounded outwards."""
        low, high = self.low.to(dtype), self.high.to(dtype)
        low = torch.where(low > self.low, low.nextafter(low - 1), low)
        high = torch.where(high < self.high, high.nextafter(high + 1), high)
        return Region(self.x.to(dtype), low, high, self.radius)

    def lowest(self, a: Tensor, rounds: int = 8) -> tuple[Tensor, Tensor]:
        """(n, s) lower bounds of a . x for `a` (n, s, *shape) over the region, and points (n, s, *shape) of it.

        In a box the bound is attained at the point. With a ball, the minimum over box and ball is bounded by the
        Lagrangian min over the box of a . d + (|d|^2 - radius^2) / 2t, whose minimiser is d = clip(-t a); every
        t > 0 gives a bound, and the best t, for which |d| = radius, is approached from below in `rounds` steps.
        """
        a = a.flatten(2)
        low, high = self.low.flatten(1), self.high.flatten(1)
        if self.radius is None:
            point = torch.where(a >= 0, low[:, None], high[:, None])
            # The middle and the reach say the same as a . point, and their gradient is that of the interval.
            value = _dot(a, (low + high) / 2) - _dot(a.abs(), (high - low) / 2)
            return value, point.view(*point.shape[:2], *self.x.shape[1:])
        x = self.x.flatten(1)
        low, high = (low - x)[:, None], (high - x)[:, None]
        step = self._step(a.detach(), low, high, rounds)
        change = torch.clamp(-step * a, low, high)
        excess = change.square().sum(2, keepdim=True) - self.radius**2
        value = _dot(a, x) + ((a * change).sum(2, keepdim=True) + excess / (2 * step)).squeeze(2)
        box = _dot(a, x) + torch.minimum(a * low, a * high).sum(2)
        point = (x[:, None] + change).view(*a.shape[:2], *self.x.shape[1:])
        return torch.maximum(value, box), point

    def _step(self, a: Tensor, low: Tensor, high: Tensor, rounds: int) -> Tensor:
        """(n, s, 1) t > 0 with |clip(-t a)| <= radius, nearly equal where the box allows it.

        The cells that clip holds fixed stay so as t grows; the others are scaled to fill the ball.
        """
        assert self.radius is not None
        square = a.square()
        tiny = torch.finfo(a.dtype).tiny
        step = self.radius / square.sum(2, keepdim=True).sqrt().clamp_min(tiny**0.5)
        for _ in range(rounds):
            moved = -step * a
            clipped = torch.clamp(moved, low, high)
            free = clipped == moved
            left = self.radius**2 - clipped.square().masked_fill(free, 0.0).sum(2, keepdim=True)
            loose = square.masked_fill(~free, 0.0).sum(2, keepdim=True)
            grown = (left.clamp_min(0.0) / loose.clamp_min(tiny)).sqrt()
            step = torch.where(loose > 0, torch.maximum(step, grown), step)
        return step.clamp(1e-12, 1e12)


def _dot(a: Tensor, v: Tensor) -> Tensor:
    """(n, s) of `a` (n, s, d) and `v` (n, d)."""
    return torch.bmm(a, v.unsqueeze(2)).squeeze(2)


def region(threat: Threat, x: Tensor) -> Region:
    """Every point that the judge counts as inside `threat` around images `x` (n, c, h, w), in float64.

    The ball is larger than eps by the slack that the judge allows.
    """
    low, high = (torch.full_like(x, end).double() for end in threat.bounds)  # as the judge compares: in float32
    x = x.double()
    reach = threat.eps + threat.slack
    if isinstance(threat, Unbounded) or (isinstance(threat, L2) and math.isinf(threat.eps)):
        return Region(x, low, high)
    if isinstance(threat, L2):
        return Region(x, torch.maximum(low, x - reach), torch.minimum(high, x + reach), reach)
    if isinstance(threat, Linf):
        return Region(x, torch.maximum(low, x - reach), torch.minimum(high, x + reach))
    raise UsageError(f"expected a threat model in linf or l2 for a proof, got {threat.norm}")
