"""The threat model of an adversarial patch: some pixels may take any legal value, the others stay."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparring.core import noise
from sparring.core.errors import UsageError
from sparring.core.threat import Threat


@dataclass(frozen=True, eq=False)
class Patch(Threat):
    """Any legal value where `mask` is true, and the very same bits elsewhere (Brown et al. 2017, arXiv 1712.09665).

    `mask` (n, 1 or c, h, w) bool has an entry for each row, or n = 1 for all of them. The distance reported is L2.
    """

    eps: float = field(default=math.inf, init=False)
    mask: Tensor = field(kw_only=True, repr=False)

    norm = "patch"
    __eq__ = object.__eq__  # the inherited one does not look at the mask
    __hash__ = object.__hash__

    def __post_init__(self) -> None:
        """Refuse what is no mask."""
        super().__post_init__()
        if self.mask.dtype != torch.bool or self.mask.dim() != 4:
            got = f"{self.mask.dtype} {tuple(self.mask.shape)}"
            raise UsageError(f"expected a bool mask (rows or 1, channels or 1, height, width), got {got}")

    def _of(self, x0: Tensor) -> Tensor:
        """The mask, once it is known to fit `x0` (n, c, h, w)."""
        fits = len(self.mask) in (1, len(x0)) and self.mask.shape[1] in (1, x0.shape[1])
        if not fits or self.mask.shape[2:] != x0.shape[2:]:
            raise UsageError(f"expected a mask for images {tuple(x0.shape)}, got {tuple(self.mask.shape)}")
        return self.mask

    def length(self, delta: Tensor) -> Tensor:
        """(n,) Euclidean lengths."""
        return delta.square().sum(1).sqrt()

    def within(self, x: Tensor, x0: Tensor, radius: Tensor) -> Tensor:
        """`x` inside the mask and the bounds, `x0` elsewhere; a mask has no radius."""
        return torch.where(self._of(x0), self.clip(x), x0)

    def steepest(self, gradient: Tensor, x: Tensor | None = None) -> Tensor:
        """The sign of the gradient."""
        return gradient.sign()

    def sample(self, x0: Tensor, key: Tensor, stream: int = 0) -> Tensor:
        """Uniform values inside the mask."""
        low, high = self.bounds
        return self.project(low + (high - low) * noise.uniform(key, x0.shape[1:], stream), x0)

    def box(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """The bounds inside the mask, the clean value elsewhere."""
        mask = self._of(x0)
        return x0.masked_fill(mask, self.bounds[0]), x0.masked_fill(mask, self.bounds[1])

    def contains(self, x: Tensor, x0: Tensor) -> Tensor:
        """(n,) bool: is `x` inside the bounds, and the same as `x0` outside the mask?"""
        low, high = self.bounds
        legal = (x >= low) & (x <= high)  # NaN is neither
        return (legal & (self._of(x0) | (x == x0))).flatten(1).all(1)

    def describe(self) -> str:
        """Such as `patch of 49 pixels`, the largest of the rows' masks."""
        return f"patch of {int(self.mask.flatten(1).sum(1).max()) // self.mask.shape[1]} pixels"
