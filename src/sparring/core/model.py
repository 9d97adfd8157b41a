"""What a model is to an attacker: something that answers queries, with more or less access."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from torch import Tensor


class Access(IntEnum):
    """How much of an answer an attacker sees; each level includes the ones before."""

    DECISION = 0  # labels
    SCORE = 1  # and logits
    GRADIENT = 2  # and vector-Jacobian products


class Pullback(Protocol):
    """The vector-Jacobian product of one query."""

    def __call__(self, cotangent: Tensor, *, keep: bool = False) -> Tensor:
        """v^T d logits / d x, (n, ...) for `cotangent` v (n, classes); `keep` allows another call."""
        ...


@dataclass(frozen=True)
class Prediction:
    """The answer to one query."""

    labels: Tensor  # (n,) int64
    logits: Tensor | None = None  # (n, classes) float32
    vjp: Pullback | None = None


class Model(Protocol):
    """A classifier of images; what its bounds and preprocessing are is its own affair."""

    @property
    def access(self) -> Access:
        """The most that it can give."""
        ...

    @property
    def bounds(self) -> tuple[float, float]:
        """The range of its pixels, in the units of the raw input."""
        ...

    def query(self, x: Tensor, access: Access) -> Prediction:
        """Answer for images `x` (n, c, h, w), each row by itself."""
        ...
