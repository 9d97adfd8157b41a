"""A short run of large steps that become small: most of what gradients can do in a dozen of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.core import noise
from sparring.core.attack import Observation, State
from sparring.core.batch import Batch, per_row
from sparring.core.errors import unknown
from sparring.core.losses import named
from sparring.core.model import Access

_SHRINKING = 0.6  # of the steps go by until the ball has its size
STARTS = ("clean", "given", "random", "blocks")


@dataclass(frozen=True)
class SprintState(State):
    """Where each row stands, and stood."""

    k: Tensor  # (n,) steps taken
    previous: Tensor  # (n, c, h, w) the point before


@dataclass(frozen=True)
class Sprint:
    """PGD on the margin with APGD's momentum, its step falling evenly from `first` eps to nothing.

    The move is that of Croce and Hein 2020, algorithm 1 (momentum 0.75). The margin does not saturate as
    cross-entropy does, and a step that falls on a plan needs no checkpoints (Ma et al. 2020, "Imbalanced
    gradients"). `start` is where it begins: `clean`, `given`, `random`, or `blocks`: every
    square of `side` pixels pushed up or down as a whole, as far as the ball allows. With `wide` above 1 the
    ball is at first so many times as wide, and shrinks evenly to its size over the first three fifths of the
    steps (in L1: Croce and Hein 2021, "Mind the box"). In L2 and L1 gradients that vanish inside
    the ball return beyond it, and a random start there is nearer to another class than any inside.
    """

    steps: int = 12
    first: float = 2.0
    loss: str = "margin"
    start: str = "random"
    side: int = 4
    momentum: float = 0.75
    wide: float = 1.0

    name: ClassVar[str] = "sprint"
    version: ClassVar[int] = 1
    needs: ClassVar[Access] = Access.GRADIENT
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")
    paper: ClassVar[str] = "Croce and Hein 2020, arXiv:2003.01690; Ma et al. 2020, arXiv:2006.13726"
    minimizes: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> SprintState:
        """Begin where `start` says."""
        if self.start not in STARTS:
            raise unknown("start", self.start, STARTS)
        x = {"clean": batch.x, "given": batch.begin}.get(self.start)
        x = self._far(batch) if x is None else x
        return SprintState(x, torch.zeros_like(batch.targeted), torch.zeros_like(batch.y), x)

    def _far(self, batch: Batch) -> Tensor:
        threat = batch.threat
        if self.start == "random":
            x = threat.sample(batch.x, batch.key)
            return x if self.wide == 1 else threat.clip(batch.x + self.wide * (x - batch.x))
        reach = torch.full_like(batch.y, self.wide * threat.eps, dtype=torch.float32)
        return threat.within(
            batch.x + per_row(reach, batch.x) * blocks(batch.key, batch.x.shape[1:], self.side), batch.x, reach
        )

    def step(self, batch: Batch, state: SprintState, seen: Observation) -> SprintState:
        """Climb, and carry some of the last move on."""
        _, gradient = seen.value_and_grad(named(self.loss))
        k = state.k + 1
        times = 1 + (self.wide - 1) * (1 - k / (_SHRINKING * self.steps)).clamp_min(0.0)
        size = per_row(batch.threat.eps * self.first * times * (1 - state.k / self.steps), state.x)

        def project(x: Tensor) -> Tensor:
            return batch.project(x) if self.wide == 1 else batch.threat.within(x, batch.x, batch.threat.eps * times)

        ahead = project(torch.addcmul(state.x, size, batch.threat.steepest(gradient, state.x)))
        share = per_row(torch.where(state.k > 0, self.momentum, 1.0), state.x)
        x = project(torch.lerp(state.x, ahead, share) + (1 - share) * (state.x - state.previous))
        return replace(state, x=x, previous=state.x, k=k, done=k >= self.steps)


def blocks(key: Tensor, shape: torch.Size, side: int) -> Tensor:
    """(n, *shape) of 1 and -1, the same within each square of `side` pixels of a channel."""
    channels, height, width = shape
    signs = noise.uniform(key, (channels, -(-height // side), -(-width // side))).sub(0.5).sign()
    signs = torch.where(signs == 0, 1.0, signs)
    return signs.repeat_interleave(side, 2).repeat_interleave(side, 3)[:, :, :height, :width].contiguous()
