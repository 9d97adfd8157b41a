"""Median smoothing: every pixel becomes the median of its neighbourhood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparring.core.errors import UsageError
from sparring.guards.guard import Transform


@dataclass(frozen=True)
class Median(Transform):
    """The median of a `size` x `size` window, the upper of two middle ones; edges mirrored: Xu et al. 2018, III-B."""

    size: int = 3

    name: ClassVar[str] = "median"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Xu et al. 2018, arXiv:1704.01155"
    differentiable: ClassVar[bool] = True
    randomised: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse a window that changes nothing."""
        if self.size < 2:
            raise UsageError(f"expected a window of at least 2 pixels, got {self.size}")

    def transform(self, x: Tensor) -> Tensor:
        """(n, c, h, w) medians; a window of even size reaches one pixel farther up and left."""
        if min(x.shape[2:]) < self.size // 2:
            raise UsageError(f"expected a window that fits images of {tuple(x.shape[2:])}, got {self.size}")
        rows, columns = self._mirrored(x.shape[2], x), self._mirrored(x.shape[3], x)
        windows = x[:, :, rows][:, :, :, columns].unfold(2, self.size, 1).unfold(3, self.size, 1).flatten(4)
        return windows.kthvalue(self.size**2 // 2 + 1, dim=4).values

    def _mirrored(self, side: int, x: Tensor) -> Tensor:
        """Indices of a row of `side` pixels with its ends mirrored, the end pixels twice."""
        before = self.size // 2
        at = torch.arange(-before, side + self.size - 1 - before, device=x.device)
        return torch.where(at < 0, -1 - at, torch.where(at >= side, 2 * side - 1 - at, at))
