"""SimBA: a step up or down along one direction of an orthonormal basis at a time, kept if the scores improve."""

from __future__ import annotations

import math
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

BASES = ("pixel", "dct")


@dataclass(frozen=True)
class SimBAState(State):
    """The best point of each row, and the direction on trial."""

    k: Tensor  # (n,) queries answered
    best: Tensor  # (n, c, h, w)
    value: Tensor  # (n,) float64 the loss there
    order: Tensor  # (n, m) directions in the order in which they are tried
    place: Tensor  # (n,) how many of them are dealt with
    down: Tensor  # (n,) bool: is the step on trial against the direction?


@dataclass(frozen=True)
class SimBA:
    """Try `size` along a direction, then against it; keep the first that makes the label less likely.

    Guo et al. 2019, algorithm 1: the pixels, or the lowest `share` of the cosines (DCT) of either axis, in a
    random order without replacement, and again in another order when all are used up. A row with a target
    makes that more likely. Steps are projected onto the threat model, and compared by log-probabilities in float64,
    where probabilities would saturate.
    """

    steps: int = 5000
    size: float = 0.2
    basis: str = "pixel"
    share: float = 1.0
    loss: str = "cross_entropy"

    name: ClassVar[str] = "simba"
    version: ClassVar[int] = 1
    needs: ClassVar[Access] = Access.SCORE
    norms: ClassVar[tuple[str, ...]] = ("l2", "unbounded")
    paper: ClassVar[str] = "Guo et al. 2019, arXiv:1905.07121"
    minimizes: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> SimBAState:
        """Start at the image, with whose scores the first step is compared."""
        if self.basis not in BASES:
            raise unknown("basis", self.basis, BASES)
        zero, none = torch.zeros_like(batch.y), torch.zeros_like(batch.targeted)
        worst = torch.full_like(zero, -torch.inf, dtype=torch.float64)
        order = self._order(batch, zero)
        return SimBAState(batch.x, none, zero, batch.x, worst, order, zero - 1, ~none)

    def _order(self, batch: Batch, stream: Tensor) -> Tensor:
        channels, height, width = batch.x.shape[1:]
        some = self.share if self.basis == "dct" else 1.0
        count = channels * math.ceil(some * height) * math.ceil(some * width)
        return noise.uniform(batch.key, (count,), stream).argsort(dim=1)

    def step(self, batch: Batch, state: SimBAState, seen: Observation) -> SimBAState:
        """Keep the step if it was good, and try the other sign or the next direction."""
        value = named(self.loss)(seen.logits, batch).double()
        better = value > state.value
        best = torch.where(per_row(better, state.x), state.x, state.best)
        value = torch.where(better, value, state.value)
        onward = better | state.down
        place, k = state.place + onward, state.k + 1
        used, order = place >= state.order.shape[1], state.order
        if used.any():
            order = torch.where(used[:, None], self._order(batch, k), order)
            place = torch.where(used, 0, place)
        after = replace(state, k=k, best=best, value=value, order=order, place=place, down=~onward)
        way = self._direction(batch, order.gather(1, place[:, None]).squeeze(1))
        size = per_row(torch.where(onward, self.size, -self.size), way)
        return replace(after, x=batch.project(best + size * way), done=k >= self.steps)

    def _direction(self, batch: Batch, index: Tensor) -> Tensor:
        """The basis vectors at (n,) `index`."""
        if self.basis == "pixel":
            place = torch.arange(batch.x[0].numel(), device=index.device)
            return (place == index[:, None]).to(batch.x.dtype).view_as(batch.x)
        channels, height, width = batch.x.shape[1:]
        high, wide = math.ceil(self.share * height), math.ceil(self.share * width)
        channel = torch.arange(channels, device=index.device) == (index // (high * wide))[:, None]
        down = cosines(height, index.device)[index // wide % high]
        across = cosines(width, index.device)[index % wide]
        wave = down[:, None, :, None] * across[:, None, None, :] * channel[:, :, None, None]
        return wave.to(batch.x.dtype)


def cosines(size: int, device: torch.device) -> Tensor:
    """(size, size) float64 orthonormal rows: the DCT-II of `size` points, from the lowest frequency up."""
    place = torch.arange(size, dtype=torch.float64, device=device)
    waves = (math.pi / size * (place + 0.5) * place[:, None]).cos() * math.sqrt(2 / size)
    return torch.cat([waves[:1] / math.sqrt(2), waves[1:]])
