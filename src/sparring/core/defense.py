"""What a training defense is: the loss that it trains on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

from sparring.core.threat import Threat


@dataclass(frozen=True)
class Moment:
    """Where in a training a batch stands."""

    progress: float  # from 0 at the first step to 1 at the last
    key: Tensor  # (n,) int64: a noise key for each image, fresh each step
    carried: Tensor | None = None  # (n, c, h, w) what a `Replaying` defense handed on; None at the first step

    def risen(self, warmup: float) -> float:
        """The share of eps, from 0 to 1, in a training whose first share `warmup` it takes to grow."""
        return min(1.0, self.progress / warmup) if warmup else 1.0

    def limit(self, threat: Threat, warmup: float) -> Threat:
        """`threat` with the eps of this moment."""
        return replace(threat, eps=threat.eps * self.risen(warmup))


class Defense(Protocol):
    """A way to train. A frozen dataclass: its fields are its options."""

    name: ClassVar[str]
    version: ClassVar[int]
    paper: ClassVar[str]

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Tensor:
        """The scalar to descend on images `x` (n, c, h, w) with labels `y` (n,)."""
        ...


@runtime_checkable
class Whole(Protocol):
    """What a defense claims if its loss looks at the minibatch as a whole; without it, it is a mean over images."""

    @property
    def whole(self) -> bool:
        """Would the mean of the losses of a minibatch's parts train to other weights?"""
        ...


@runtime_checkable
class Replaying(Defense, Protocol):
    """A defense that trains on each minibatch several times in a row, and hands something on from step to step."""

    @property
    def replays(self) -> int:
        """How many steps in a row see the same images."""
        ...

    def hand_on(self, x: Tensor, gradient: Tensor, moment: Moment) -> Tensor:
        """What the next moment carries, given the gradient of the loss in `x` from the same backward pass."""
        ...
