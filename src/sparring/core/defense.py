"""What a training defense is: the loss that it trains on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class Moment:
    """Where in a training a batch stands."""

    progress: float  # from 0 at the first step to 1 at the last
    key: Tensor  # (n,) int64: a noise key for each image, fresh each step


class Defense(Protocol):
    """A way to train. A frozen dataclass: its fields are its options."""

    name: ClassVar[str]
    version: ClassVar[int]
    paper: ClassVar[str]

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Tensor:
        """The scalar to descend on images `x` (n, c, h, w) with labels `y` (n,)."""
        ...
