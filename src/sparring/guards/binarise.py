"""Black or white: every pixel becomes 0 or 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparring.core.errors import UsageError
from sparring.guards.guard import Transform


@dataclass(frozen=True)
class Binarise(Transform):
    """1 where x >= threshold, else 0: the 1-bit case of Xu et al. 2018, section III-A, with a threshold of choice."""

    threshold: float = 0.5

    name: ClassVar[str] = "binarise"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Xu et al. 2018, arXiv:1704.01155"
    differentiable: ClassVar[bool] = False
    randomised: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse a threshold that makes all pixels equal."""
        if not 0 < self.threshold <= 1:
            raise UsageError(f"expected a threshold in (0, 1], got {self.threshold}")

    def transform(self, x: Tensor) -> Tensor:
        """(n, c, h, w) zeros and ones."""
        return (x >= self.threshold).to(x.dtype)
