"""SPSA: Adam on gradients that are estimated from scores, by moving all pixels at once, each up or down at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.attacks.nes import AroundState, asking, estimated, even, signed
from sparring.core import noise
from sparring.core.attack import Observation
from sparring.core.batch import Batch, per_row
from sparring.core.losses import named
from sparring.core.model import Access

_FIRST, _SECOND = 0.9, 0.999  # Adam's decay of its two means


@dataclass(frozen=True)
class SPSAState(AroundState):
    """And Adam's memory."""

    mean: Tensor  # (n, c, h, w) of the gradients so far, decaying
    square: Tensor  # (n, c, h, w) of their squares


@dataclass(frozen=True)
class SPSA:
    """Ask about a point, then about `samples` around it at pixel distance `delta`; let Adam climb; and again.

    Uesato et al. 2018, algorithm 1 (Spall's estimate with signs for directions, antithetic here as there,
    and Adam on the margin). Samples are clipped to the bounds; each counts as far as it then lies from
    the point, times what the loss gained. Adam's rate is eps / 10 unless `rate` is given.
    """

    steps: int = 5000
    samples: int = 20
    delta: float = 0.01
    rate: float | None = None
    loss: str = "margin"

    name: ClassVar[str] = "spsa"
    version: ClassVar[int] = 2
    needs: ClassVar[Access] = Access.SCORE
    norms: ClassVar[tuple[str, ...]] = ("linf",)
    paper: ClassVar[str] = "Uesato et al. 2018, arXiv:1802.05666"
    minimizes: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> SPSAState:
        """Start at the point that is given, or at the image."""
        even(self.samples)
        zero, still, x = torch.zeros_like(batch.y), torch.zeros_like(batch.x), batch.begin
        return SPSAState(x, torch.zeros_like(batch.targeted), zero, x, zero.double(), still, still, still)

    def step(self, batch: Batch, state: SPSAState, seen: Observation) -> SPSAState:
        """Add to the estimate; when it is complete, let Adam climb."""
        value = named(self.loss)(seen.logits, batch).double()
        after = estimated(batch, state, value, self.samples, self._climb)
        x = after.base + self.delta * signed(after.k, self.samples, batch, _signs)
        return asking(batch, after, x, self.samples, self.steps)

    def _climb(self, batch: Batch, state: SPSAState) -> SPSAState:
        gradient = state.gradient / (self.delta**2 * self.samples)
        mean = _FIRST * state.mean + (1 - _FIRST) * gradient
        square = _SECOND * state.square + (1 - _SECOND) * gradient.square()
        t = per_row((state.k // (self.samples + 1)).float(), mean)
        move = mean / (1 - _FIRST**t) / ((square / (1 - _SECOND**t)).sqrt() + 1e-8)
        rate = batch.threat.eps / 10 if self.rate is None else self.rate
        return replace(state, base=batch.project(state.base + rate * move), mean=mean, square=square)


def _signs(key: Tensor, shape: Sequence[int], stream: Tensor) -> Tensor:
    return torch.where(noise.uniform(key, shape, stream) < 0.5, -1.0, 1.0)
