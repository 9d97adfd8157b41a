"""Structural similarity as a threat model: the image must look alike, whatever its pixels do."""

from __future__ import annotations

import torch
from torch import Tensor

from sparring.core import noise
from sparring.core.batch import per_row
from sparring.core.errors import UsageError
from sparring.core.threat import Threat

_REACH, _SIGMA = 5, 1.5  # 11 x 11 pixels: Wang et al. 2004, section III.C
_C1, _C2 = 0.01**2, 0.03**2  # K1 and K2, for a pixel range of 1


class SSIM(Threat):
    """1 - mean SSIM (Wang et al. 2004, equations 13 to 17) is at most eps: 0 for the image itself, at most 2.

    It is no norm: it compares two images and has no ball with a closed form. So `within` gives a legal point, not
    the nearest, and `steepest` the direction of the gradient.
    A window stands on every pixel, cut off at the frame. The authors' code has only windows that lie inside it: the
    corners then weigh next to nothing, and an attack told so paints them.
    """

    norm = "ssim"

    @property
    def slack(self) -> float:
        """It does not depend on the pixel range."""
        return 1e-6

    def length(self, delta: Tensor) -> Tensor:
        """A change has no length of its own here."""
        raise UsageError("SSIM compares two images; ask for their distance, not for the length of a change")

    def distance(self, x: Tensor, x0: Tensor) -> Tensor:
        """(n,) float64 1 - mean SSIM, over the channels too; its gradient can be taken."""
        low, high = self.bounds
        return 1.0 - similarity((x.double() - low) / (high - low), (x0.double() - low) / (high - low))

    def farthest(self, x0: Tensor) -> float:
        """SSIM is at least -1."""
        return 2.0

    def within(self, x: Tensor, x0: Tensor, radius: Tensor) -> Tensor:
        """Legal points on the way from `x0` to clip(x), as far along as 40 halvings can tell.

        The distance need not grow all the way, so farther ones may be legal too; the one given always is.
        """
        inside = self.clip(x)
        radius = radius.double()
        over = self.distance(inside, x0) > radius + self.slack / 4  # who stands on the border stays
        if not over.any():
            return inside
        low = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        high, nearest = torch.ones_like(low), x0
        for _ in range(40):
            middle = (low + high) / 2
            point = self.clip((x0 + per_row(middle, x) * (inside.double() - x0)).to(x.dtype))
            fits = self.distance(point, x0) <= radius
            nearest = torch.where(per_row(fits, x), point, nearest)
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        return torch.where(per_row(over, x), nearest, inside)

    def steepest(self, gradient: Tensor, x: Tensor | None = None) -> Tensor:
        """The gradient over its L2 length."""
        return torch.nn.functional.normalize(gradient.flatten(1), dim=1).view_as(gradient)

    def sample(self, x0: Tensor, key: Tensor, stream: int = 0) -> Tensor:
        """On the way to an image uniform over all, as far as a uniform share of eps allows."""
        low, high = self.bounds
        anywhere = low + (high - low) * noise.uniform(key, x0.shape[1:], 2 * stream)
        share = noise.uniform(key, (1,), 2 * stream + 1).squeeze(1)
        return self.within(anywhere, x0, share * min(self.eps, 2.0))


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """(n,) mean SSIM of images (n, c, h, w) with a pixel range of 1, over windows around every pixel.

    The window is a Gaussian of deviation 1.5 on 11 x 11 pixels, of which only those inside the frame count; its
    weights sum to 1. Variances are weighted by it (equations 14 to 16), without n / (n - 1).
    """
    mean_a, mean_b, aa, bb, ab = _windowed(torch.stack([a, b, a * a, b * b, a * b]))
    square_a, square_b, product = mean_a * mean_a, mean_b * mean_b, mean_a * mean_b
    above = (2 * product + _C1) * (2 * (ab - product) + _C2)
    below = (square_a + square_b + _C1) * ((aa - square_a) + (bb - square_b) + _C2)
    index: Tensor = above / below
    return index.flatten(1).mean(1)


def _windowed(maps: Tensor) -> Tensor:
    """The weighted mean of (..., h, w) in every window: one line after the other, since the Gaussian is separable."""
    for dim in (-2, -1):
        at = torch.arange(maps.shape[dim], dtype=maps.dtype, device=maps.device)
        apart = (at[:, None] - at).abs()
        weight = (-(apart / _SIGMA).square() / 2).exp() * (apart <= _REACH)
        weight = weight / weight.sum(1, keepdim=True)
        maps = weight @ maps if dim == -2 else maps @ weight.T
    return maps
