"""What a model is to an attacker: something that answers queries, with more or less access."""

from __future__ import annotations

from abc import ABC, abstractmethod
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
    votes: Tensor | None = None  # (n,) share of the draws of a random model that name the label; None of any other
    flagged: Tensor | None = None  # (n,) bool: refused by the model's detector, its last class; None: it has none


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


class Sampled(ABC):
    """A model whose answers come of several draws of a random one: `sparring.EOT`, and what wraps it."""

    @property
    @abstractmethod
    def passes(self) -> int:
        """Forward passes that a query costs a row, and backward passes that a pullback does."""
        ...

    @abstractmethod
    def fresh(self) -> Model:
        """The same, of other draws: what a search found under its own draws is confirmed under those."""
        ...


def passes(model: Model) -> int:
    """Forward passes that a query costs a row, and backward passes that a pullback does."""
    return model.passes if isinstance(model, Sampled) else 1


def fresh(model: Model) -> Model:
    """The model that confirms what was found by asking `model`: itself, unless it answers from draws."""
    return model.fresh() if isinstance(model, Sampled) else model
