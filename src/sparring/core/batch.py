"""Frozen tables of row tensors, and the batch that every attack works on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparring.core.threat import Threat


@dataclass(frozen=True)
class Rows:
    """A frozen dataclass whose tensor fields all have one entry for each row."""

    def _map(self, change: Callable[[str, Tensor], Tensor]) -> Self:
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: change(k, v) for k, v in values.items() if isinstance(v, Tensor)})

    def take(self, index: Tensor) -> Self:
        """The rows at `index` (m,), in that order."""
        return self._map(lambda _, tensor: tensor[index])

    def put(self, seats: Tensor, rows: Self) -> Self:
        """A copy in which `rows` (m of them) stand at `seats` (m,)."""
        return self._map(lambda name, tensor: tensor.index_copy(0, seats, getattr(rows, name)))


@dataclass(frozen=True)
class Batch(Rows):
    """What an attack is told about its rows; it stays the same from a row's first step to its last."""

    x: Tensor  # (n, c, h, w) float32: the images to start from and to stay near
    y: Tensor  # (n,) int64: true labels
    target: Tensor  # (n,) int64: the class to reach, or -1 for any wrong one
    key: Tensor  # (n,) int64: noise keys, see `noise.keys`
    threat: Threat
    start: Tensor | None = None  # (n, c, h, w): a legal point that a warm-started attack begins at; None: `x`

    @property
    def begin(self) -> Tensor:
        """(n, c, h, w) points to begin at: `start`, or the images themselves."""
        return self.x if self.start is None else self.start

    @cached_property
    def targeted(self) -> Tensor:
        """(n,) bool: does the row have a class to reach?"""
        return self.target >= 0

    @cached_property
    def label(self) -> Tensor:
        """(n,) int64: the class to reach, or else the true one, which is to be left."""
        return torch.where(self.targeted, self.target, self.y)

    @cached_property
    def sign(self) -> Tensor:
        """(n,) float32: 1 where the label is to be reached, -1 where it is to be left."""
        return self.targeted.float() * 2 - 1

    @cached_property
    def box(self) -> tuple[Tensor, Tensor] | None:
        """The least and largest legal value of every pixel, where these say it all; see `Threat.box`."""
        return self.threat.box(self.x)

    def project(self, x: Tensor) -> Tensor:
        """The legal points that stand for `x` (n, c, h, w), as the threat model has it."""
        return self.threat.project(x, self.x) if self.box is None else torch.clamp(x, *self.box)


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """(n,) `values` shaped (n, 1, ..., 1), to broadcast against `like` (n, ...)."""
    return values.view(-1, *(1,) * (like.dim() - 1))
