"""Threat models: what an attacker may do to an image.

`distance` and `contains` compute in float64. A point counts as inside when it is within `slack` of the
border: float32 images cannot hold x + eps exactly, and an 8-bit image 8/255 away is meant to be inside a
ball of 8/255. The slack is 1e-6 of the width of the pixel range; a proof must cover it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from sparring.core import noise
from sparring.core.batch import per_row
from sparring.core.errors import UsageError, unknown


@dataclass(frozen=True)
class Threat(ABC):
    """All images within `eps` of the clean one, with pixels inside `bounds`. Units: those of the input."""

    eps: float
    bounds: tuple[float, float] = (0.0, 1.0)
    norm: ClassVar[str]

    def __post_init__(self) -> None:
        """Refuse what can be no radius or no range."""
        if not self.eps >= 0:  # also catches NaN
            raise UsageError(f"expected eps >= 0, got {self.eps}; give it in the units of the input")
        low, high = self.bounds
        if not low < high:
            raise UsageError(f"expected bounds (low, high) with low < high, got {self.bounds}")

    @property
    def slack(self) -> float:
        """How far outside a point may lie and still count as inside: room for float32 rounding."""
        return 1e-6 * (self.bounds[1] - self.bounds[0]) * max(1.0, self.eps if math.isfinite(self.eps) else 1.0)

    @property
    def changes(self) -> Self:
        """The same ball about 0, for changes themselves: any change of a pixel inside the bounds fits in its own."""
        low, high = self.bounds
        return replace(self, bounds=(low - high, high - low))

    @abstractmethod
    def length(self, delta: Tensor) -> Tensor:
        """(n,) the norm of each (n, d) perturbation."""

    def project(self, x: Tensor, x0: Tensor) -> Tensor:
        """The legal points that stand for `x` (n, ...) around `x0`; legal points stay where they are."""
        return self.within(x, x0, torch.full((1,), self.eps, device=x.device))

    @abstractmethod
    def within(self, x: Tensor, x0: Tensor, radius: Tensor) -> Tensor:
        """`project` for a ball of another `radius` (n,) or (1,): float32, in the units of eps."""

    @abstractmethod
    def steepest(self, gradient: Tensor, x: Tensor | None = None) -> Tensor:
        """The step of unit norm that climbs fastest along `gradient` (n, ...); zero where that is zero.

        Where one feature can use up the whole step, those that cannot move any further from `x` are passed over.
        """

    @abstractmethod
    def sample(self, x0: Tensor, key: Tensor, stream: int = 0) -> Tensor:
        """A random legal point for each row, drawn from its noise key."""

    def box(self, x0: Tensor) -> tuple[Tensor, Tensor] | None:
        """The least and largest legal value of every pixel around `x0`, where these say it all; else None."""
        return None

    def distance(self, x: Tensor, x0: Tensor) -> Tensor:
        """(n,) float64 distances between `x` and `x0`."""
        return self.length((x.double() - x0.double()).flatten(1))

    def farthest(self, x0: Tensor) -> float:
        """The largest distance that two images of the shape of `x0` (n, ...) can have inside the bounds."""
        low, high = self.bounds
        return float(self.length(torch.full((1, x0[0].numel()), high - low, dtype=torch.float64)))

    def contains(self, x: Tensor, x0: Tensor) -> Tensor:
        """(n,) bool: is `x` finite, inside the bounds, and within eps of `x0`?"""
        low, high = self.bounds
        flat = x.flatten(1)
        inside = ((flat >= low) & (flat <= high)).all(1)  # NaN is neither
        return inside.logical_and(self.distance(x, x0) <= self.eps + self.slack)

    def quantise(self, x: Tensor, x0: Tensor) -> Tensor:
        """The nearest 8-bit images (256 levels across `bounds`) that stay in the ball where `x` did.

        Rounds to the nearest level; a row that this would push out of the ball is rounded towards `x0`.
        """
        low, high = self.bounds
        level, origin = (x - low) * (255.0 / (high - low)), (x0 - low) * (255.0 / (high - low))
        nearest = level.round()
        out = ~self.contains(nearest / 255.0 * (high - low) + low, x0)
        inward = torch.where(level > origin, (level + 1e-4).floor(), (level - 1e-4).ceil())
        # `inward` may not cross the origin when that is no level itself; the judge has the last word.
        return torch.where(per_row(out, x), inward, nearest) / 255.0 * (high - low) + low

    def _movable(self, gradient: Tensor, x: Tensor | None) -> Tensor:
        """`gradient` without the entries that point out of the bounds where `x` already stands on them."""
        if x is None:
            return gradient
        low, high = self.bounds
        return gradient.masked_fill(((gradient > 0) & (x >= high)) | ((gradient < 0) & (x <= low)), 0.0)

    def clip(self, x: Tensor) -> Tensor:
        """`x` with every pixel moved inside the bounds."""
        return x.clamp(*self.bounds)

    def describe(self) -> str:
        """Such as `linf eps 0.3`."""
        return f"{self.norm} eps {self.eps:.4g}"


def _unit(gradient: Tensor) -> Tensor:
    """`gradient` over its L2 norm, scaled first so that tiny gradients keep their direction."""
    flat = gradient.flatten(1)
    flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(1e-38)
    length = flat.square().sum(1, keepdim=True).sqrt()
    return (flat / length.clamp_min(1e-12)).view_as(gradient)


def _largest(values: Tensor, count: int) -> Tensor:
    """(n, d) bool: the `count` largest entries of each row."""
    keep = torch.zeros_like(values, dtype=torch.bool)
    return keep.scatter(1, values.topk(min(count, values.shape[1]), dim=1).indices, True)


class Linf(Threat):
    """No pixel changes by more than eps."""

    norm = "linf"

    def length(self, delta: Tensor) -> Tensor:
        """(n,) largest absolute change."""
        return delta.abs().amax(1)

    def within(self, x: Tensor, x0: Tensor, radius: Tensor) -> Tensor:
        """The nearest points of the cube and the bounds (exact in every norm)."""
        reach = per_row(radius, x)
        return torch.clamp(x, self.clip(x0 - reach), self.clip(x0 + reach))

    def box(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """The cube and the bounds together."""
        return self.clip(x0 - self.eps), self.clip(x0 + self.eps)

    def steepest(self, gradient: Tensor, x: Tensor | None = None) -> Tensor:
        """The sign of the gradient."""
        return gradient.sign()

    def sample(self, x0: Tensor, key: Tensor, stream: int = 0) -> Tensor:
        """Uniform in the cube, then clipped to the bounds."""
        u = noise.uniform(key, x0.shape[1:], stream)
        return self.project(x0 + (2.0 * u - 1.0) * self.eps, x0)


class L2(Threat):
    """The Euclidean length of the change is at most eps."""

    norm = "l2"

    def length(self, delta: Tensor) -> Tensor:
        """(n,) Euclidean lengths."""
        return delta.square().sum(1).sqrt()

    def within(self, x: Tensor, x0: Tensor, radius: Tensor) -> Tensor:
        """The nearest point of ball and box together: clip(x0 + t (x - x0)) for the largest t <= 1 that fits.

        t is found from below: with the pixels that clip held fixed, the others are scaled to fill the ball.
        A row that has found its t keeps it, so its result does not hang on how long its neighbours take.
        """
        inside = self.clip(x)
        over = (inside - x0).flatten(1).norm(dim=1) > radius + self.slack / 4  # who stands on the border stays
        if not over.any():
            return inside
        origin, delta = x0.flatten(1), (x - x0).flatten(1)
        low, high = self.bounds[0] - origin, self.bounds[1] - origin
        square = delta.square()
        radius = radius[:, None]
        scale = (radius / delta.norm(dim=1, keepdim=True).clamp_min(1e-38)).clamp_max(1.0)
        for _ in range(4):
            scaled = delta * scale
            clipped = scaled.clamp(low, high)
            free = (clipped == scaled).to(delta.dtype)
            fixed = (clipped.square() * (1.0 - free)).sum(1, keepdim=True)
            loose = (square * free).sum(1, keepdim=True).clamp_min(1e-30)
            before = scale
            scale = torch.maximum(scale, ((radius**2 - fixed).clamp_min(0.0) / loose).sqrt().clamp_max(1.0))
            if torch.equal(scale, before):
                break
        nearest = self.clip(x0 + (delta * scale).view_as(x))
        return torch.where(per_row(over, x), nearest, inside)

    def steepest(self, gradient: Tensor, x: Tensor | None = None) -> Tensor:
        """The gradient over its length."""
        return _unit(gradient)

    def sample(self, x0: Tensor, key: Tensor, stream: int = 0) -> Tensor:
        """Uniform in the ball, then clipped to the bounds."""
        direction = _unit(noise.normal(key, x0.shape[1:], 2 * stream))
        radius = noise.uniform(key, (1,), 2 * stream + 1).squeeze(1) ** (1.0 / x0[0].numel())
        return self.project(x0 + direction * per_row(radius * self.eps, x0), x0)


class Unbounded(L2):
    """Any image inside the bounds; the distance reported is L2."""

    norm = "unbounded"

    def __init__(self, bounds: tuple[float, float] = (0.0, 1.0)) -> None:
        super().__init__(math.inf, bounds)

    def within(self, x: Tensor, x0: Tensor, radius: Tensor) -> Tensor:
        """The nearest image inside the bounds."""
        return self.clip(x)

    def sample(self, x0: Tensor, key: Tensor, stream: int = 0) -> Tensor:
        """Uniform over all images."""
        low, high = self.bounds
        return low + (high - low) * noise.uniform(key, x0.shape[1:], stream)

    def describe(self) -> str:
        """`unbounded`."""
        return self.norm


class L1(Threat):
    """The absolute changes sum to at most eps."""

    norm = "l1"

    def length(self, delta: Tensor) -> Tensor:
        """(n,) sums of absolute changes."""
        return delta.abs().sum(1)

    def within(self, x: Tensor, x0: Tensor, radius: Tensor) -> Tensor:
        """The nearest point of ball and box together (Croce and Hein 2021, "Mind the box", section 3.1).

        It is clip(soft(x - x0, t), box) for the smallest t >= 0 that meets the budget, found by bisection.
        """
        origin = x0.flatten(1).double()
        delta = x.flatten(1).double() - origin
        low, high = self.bounds[0] - origin, self.bounds[1] - origin

        def shrunk(t: Tensor) -> Tensor:
            return (delta.sign() * (delta.abs() - t).clamp_min(0)).clamp(low, high)

        below, above = torch.zeros_like(delta[:, :1]), delta.abs().amax(1, keepdim=True)
        eps = radius.double()[:, None]
        free = shrunk(below).abs().sum(1, keepdim=True) <= eps
        for _ in range(50):
            middle = (below + above) / 2
            fits = shrunk(middle).abs().sum(1, keepdim=True) <= eps
            below, above = torch.where(fits, below, middle), torch.where(fits, middle, above)
        change = shrunk(torch.where(free, 0.0, above))
        near = (origin + change).to(x.dtype)
        # Rounding moves each of many pixels a little, and those add up: never round away from x0.
        away = (near.double() - origin).abs() > change.abs()
        return self.clip(torch.where(away, near.nextafter(x0.flatten(1)), near).view_as(x))

    def steepest(self, gradient: Tensor, x: Tensor | None = None) -> Tensor:
        """Equal steps on the 1 % of features with the largest gradient (SLIDE: Tramer and Boneh 2019)."""
        flat = self._movable(gradient, x).flatten(1)
        count = max(1, flat.shape[1] // 100)
        return (flat.sign() * _largest(flat.abs(), count) / count).view_as(gradient)

    def sample(self, x0: Tensor, key: Tensor, stream: int = 0) -> Tensor:
        """Laplace noise of length eps, projected."""
        u = noise.uniform(key, x0.shape[1:], stream).flatten(1).double() - 0.5
        delta = u.sign() * (1.0 - 2.0 * u.abs()).clamp_min(1e-12).log()
        delta = delta * (self.eps / delta.abs().sum(1, keepdim=True))
        return self.project(x0 + delta.to(x0.dtype).view_as(x0), x0)


class L0(Threat):
    """At most eps features (pixel x channel) change, by any amount."""

    norm = "l0"

    def length(self, delta: Tensor) -> Tensor:
        """(n,) number of changed features."""
        return (delta != 0).sum(1).double()

    def within(self, x: Tensor, x0: Tensor, radius: Tensor) -> Tensor:
        """The largest changes kept after clipping, the rest undone (the nearest legal point)."""
        clipped, origin = self.clip(x).flatten(1), x0.flatten(1)
        change = (clipped - origin).abs()
        place = change.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return torch.where(place < radius[:, None].floor(), clipped, origin).view_as(x)

    def steepest(self, gradient: Tensor, x: Tensor | None = None) -> Tensor:
        """The sign of the gradient on the feature where it is largest."""
        flat = self._movable(gradient, x).flatten(1)
        return (flat.sign() * _largest(flat.abs(), 1)).view_as(gradient)

    def sample(self, x0: Tensor, key: Tensor, stream: int = 0) -> Tensor:
        """Uniform values on eps features chosen at random."""
        low, high = self.bounds
        order = noise.uniform(key, x0.shape[1:], 2 * stream).flatten(1)
        values = low + (high - low) * noise.uniform(key, x0.shape[1:], 2 * stream + 1).flatten(1)
        keep = _largest(order, int(min(self.eps, order.shape[1])))
        return torch.where(keep, values, x0.flatten(1)).view_as(x0)


NORMS: dict[str, type[Threat]] = {kind.norm: kind for kind in (Linf, L2, L1, L0)}
NAMES = (*NORMS, "ssim", Unbounded.norm)


def threat(norm: str, eps: float, bounds: tuple[float, float] = (0.0, 1.0)) -> Threat:
    """The threat model with this `norm` (linf, l2, l1, l0, ssim or unbounded) and radius."""
    if norm == Unbounded.norm:
        return Unbounded(bounds)
    if norm == "ssim":
        from sparring.core.ssim import SSIM  # it builds on this module

        return SSIM(eps, bounds)
    if norm not in NORMS:
        raise unknown("norm", norm, NAMES)
    return NORMS[norm](eps, bounds)
