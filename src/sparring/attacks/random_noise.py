"""Plain random noise of the size that the threat model allows: what an attack must beat; labels only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.core import noise
from sparring.core.attack import Observation, State
from sparring.core.batch import Batch
from sparring.core.model import Access


@dataclass(frozen=True)
class RandomNoiseState(State):
    """How many draws a row has had."""

    k: Tensor  # (n,) queries answered


@dataclass(frozen=True)
class RandomNoise:
    """`steps` random legal points, each drawn afresh: uniform in the ball for Linf and L2.

    It learns nothing from the answers. Fawzi et al. 2016, section 2, define robustness to random noise beside
    that to the worst case; a model that this breaks is no model to attack.
    """

    steps: int = 100

    name: ClassVar[str] = "noise"
    version: ClassVar[int] = 1
    needs: ClassVar[Access] = Access.DECISION
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1", "l0", "ssim", "unbounded")
    paper: ClassVar[str] = "a control; cf. Fawzi et al. 2016, arXiv:1608.08967"
    minimizes: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False
    restricted: ClassVar[bool] = True

    def init(self, batch: Batch) -> RandomNoiseState:
        """Ask about a first draw."""
        zero = torch.zeros_like(batch.y)
        return RandomNoiseState(_draw(batch, zero), torch.full_like(batch.targeted, self.steps <= 1), zero)

    def step(self, batch: Batch, state: RandomNoiseState, seen: Observation) -> RandomNoiseState:
        """Ask about the next."""
        k = state.k + 1
        return replace(state, x=_draw(batch, k), k=k, done=k + 1 >= self.steps)


def _draw(batch: Batch, k: Tensor) -> Tensor:
    """The threat model's own sample, under a noise key that belongs to the row and its draw `k` (n,)."""
    return batch.project(batch.threat.sample(batch.x, noise.bits(batch.key, (), k)))
