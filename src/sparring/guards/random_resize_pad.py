"""A random size and a random place, drawn anew at each call."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from sparring.core.errors import UsageError
from sparring.guards.guard import Transform


@dataclass(frozen=True)
class RandomResizePad(Transform):
    """Resized to a random size, then padded with zeros on random sides: Xie et al. 2018, section 3.

    They enlarge 299 pixels to 299 ... 330 and pad to 331; here images shrink to `least` ... 1 of their side and are
    padded to it, so that the net may be one that takes a single size. One draw serves all rows of a call.
    """

    least: float = 0.8

    name: ClassVar[str] = "random_resize_pad"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Xie et al. 2018, arXiv:1711.01991"
    differentiable: ClassVar[bool] = True
    randomised: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse what leaves no image, or nothing to draw."""
        if not 0 < self.least < 1:
            raise UsageError(f"expected least in (0, 1), got {self.least}")

    def transform(self, x: Tensor) -> Tensor:
        """(n, c, h, w) the resized images (bilinear) on black."""
        height, width = x.shape[2:]
        smallest = max(1, math.ceil(self.least * height - 1e-9))
        tall = int(torch.randint(smallest, height + 1, ()))
        wide = max(1, round(width * tall / height))
        top, left = int(torch.randint(height - tall + 1, ())), int(torch.randint(width - wide + 1, ()))
        small = interpolate(x, size=(tall, wide), mode="bilinear", align_corners=False)
        return pad(small, (left, width - wide - left, top, height - tall - top))
