"""Fewer bits a pixel: small changes are rounded away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparring.core.errors import UsageError
from sparring.guards.guard import Transform


@dataclass(frozen=True)
class BitDepth(Transform):
    """round((2^bits - 1) x) / (2^bits - 1): Xu et al. 2018, section III-A; halves go to the even level."""

    bits: int = 3

    name: ClassVar[str] = "bit_depth"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Xu et al. 2018, arXiv:1704.01155"
    differentiable: ClassVar[bool] = False
    randomised: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse what leaves no two levels."""
        if not 1 <= self.bits <= 16:
            raise UsageError(f"expected 1 to 16 bits, got {self.bits}")

    def transform(self, x: Tensor) -> Tensor:
        """(n, c, h, w) the nearest of 2^bits levels from 0 to 1."""
        top: int = 2**self.bits - 1
        return (x * top).round() / top
