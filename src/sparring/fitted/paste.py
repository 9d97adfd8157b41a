"""Where a patch goes and how it gets there: a place, a turn and a size for each image, pasted with gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.core import noise
from sparring.core.batch import per_row
from sparring.core.errors import UsageError, unknown

SHAPES = ("square", "circle")


@dataclass(frozen=True)
class Paste:
    """The family of transformations of Brown et al. 2017 (arXiv 1712.09665), section 2, for a patch of `size` pixels.

    A patch is turned by up to `rotation` degrees either way, scaled by a factor between those of `scale`, and put
    anywhere that it lies in the image as a whole; with `location`, always at that (top, left).
    """

    size: int
    shape: str = "square"
    rotation: float = 15.0
    scale: tuple[float, float] = (0.9, 1.1)
    location: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Refuse what is no patch."""
        if self.shape not in SHAPES:
            raise unknown("patch shape", self.shape, SHAPES)
        low, high = self.scale
        if self.size < 1 or not 0 < low <= high:
            raise UsageError(f"expected a size of at least 1 and 0 < low <= high, got {self.size} and {self.scale}")
        if not 0 <= self.rotation <= 180:
            raise UsageError(f"expected a rotation from 0 to 180 degrees, got {self.rotation}")

    def check(self, height: int, width: int) -> None:
        """Refuse images in which the patch has no place."""
        if self.size > min(height, width):
            raise UsageError(
                f"expected a patch of at most {min(height, width)} pixels, got {self.size}; make it smaller"
            )
        if self.location is not None:
            top, left = self.location
            if not (0 <= top <= height - self.size and 0 <= left <= width - self.size):
                raise UsageError(
                    f"expected a location from (0, 0) to ({height - self.size}, {width - self.size}), "
                    f"got {self.location}"
                )

    def footprint(self, device: torch.device | None = None) -> Tensor:
        """(size, size) bool: the pixels that belong to the patch."""
        away = (torch.arange(self.size, device=device) + 0.5) * 2 / self.size - 1
        return self._covers(torch.stack(torch.meshgrid(away, away, indexing="xy"), -1))

    def _covers(self, at: Tensor) -> Tensor:
        """(...) bool for points (..., 2), in units of half a patch from its middle."""
        reach = at.abs().amax(-1) if self.shape == "square" else at.square().sum(-1)
        return reach <= 1 + 1e-5

    def grid(self, key: Tensor, stream: int, height: int, width: int) -> Tensor:
        """(n, height, width, 2) the point (x, y) of the patch under every pixel, for (n,) noise keys.

        In units of half a patch from its middle. Without rotation and scale pixels lie upon pixels.
        """
        draw = noise.uniform(key, (4,), stream)
        angle = (2 * draw[:, 0] - 1) * math.radians(self.rotation)
        factor = self.scale[0] + draw[:, 1] * (self.scale[1] - self.scale[0])
        cos, sin = angle.cos(), angle.sin()
        half = factor * self.size / 2  # of the patch, and of the box around it
        around = half * (cos.abs() + sin.abs()) if self.shape == "square" else half
        if self.location is None:
            row, column = (self._middle(draw[:, 2 + i], around, side) for i, side in enumerate((height, width)))
        else:
            row, column = (torch.full_like(half, place + self.size / 2) for place in self.location)
        down = torch.arange(height, device=key.device)[:, None] + 0.5 - per_row(row, draw[:, :, None])
        right = torch.arange(width, device=key.device)[None, :] + 0.5 - per_row(column, draw[:, :, None])
        cos, sin, half = (per_row(v, draw[:, :, None]) for v in (cos, sin, half))
        return torch.stack([(cos * right + sin * down) / half, (cos * down - sin * right) / half], -1)

    @staticmethod
    def _middle(share: Tensor, around: Tensor, side: int) -> Tensor:
        """(n,) where the middle goes along a side: whole pixels from the border, or the middle if it is tight."""
        room = side - 2 * around
        steps = room.floor() + 1
        return torch.where(room < 0, side / 2, around + (share * steps).floor().minimum(steps - 1))

    def paste(self, patch: Tensor, x: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
        """Images `x` (n, c, h, w) with the patch (c, size, size) on them, and masks (n, 1, h, w) of where it lies.

        Bilinear between the patch's pixels; every pixel outside the mask is that of `x`, bit for bit.
        """
        mask = self._covers(grid)[:, None]
        many = patch.expand(len(x), *patch.shape)
        drawn = torch.nn.functional.grid_sample(many, grid, "bilinear", "border", align_corners=False)
        return torch.where(mask, drawn, x), mask
