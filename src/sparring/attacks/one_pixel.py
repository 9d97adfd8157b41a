"""One pixel: differential evolution of where and how to change a few pixels, by scores."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.core import noise
from sparring.core.attack import Observation, State
from sparring.core.batch import Batch, per_row
from sparring.core.errors import UsageError
from sparring.core.losses import named
from sparring.core.model import Access


@dataclass(frozen=True)
class OnePixelState(State):
    """The population of each row, and the candidate that is asked about."""

    k: Tensor  # (n,) queries answered
    genes: Tensor  # (n, members, pixels, 2 + c) row, column and values, all as shares of their range
    fitness: Tensor  # (n, members) float64 the loss of each member
    trial: Tensor  # (n, pixels, 2 + c) the candidate: a first member, or the child of the member whose turn it is


@dataclass(frozen=True)
class OnePixel:
    """A member plus `scale` times the difference of two others replaces the member whose turn it is, if no worse.

    Su et al. 2019, section 3: differential evolution without crossover, first values normal
    around the middle of the range. Here a child takes its parent's place at once and not at the end of the
    generation; what leaves its range is drawn anew; and as many pixels change as eps features allow (at least one,
    of which as many channels change as eps allows).
    """

    steps: int = 5000
    members: int = 100
    scale: float = 0.5
    loss: str = "cross_entropy"

    name: ClassVar[str] = "one_pixel"
    version: ClassVar[int] = 1
    needs: ClassVar[Access] = Access.SCORE
    norms: ClassVar[tuple[str, ...]] = ("l0",)
    paper: ClassVar[str] = "Su et al. 2019, arXiv:1710.08864"
    minimizes: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> OnePixelState:
        """Ask about a first member."""
        if self.members < 4:
            raise UsageError(f"expected at least 4 members, a parent and three others; got {self.members}")
        channels = batch.x.shape[1]
        pixels = max(1, int(min(batch.threat.eps, batch.x[0].numel()) // channels))
        zero, none = torch.zeros_like(batch.y), torch.zeros_like(batch.targeted)
        genes = torch.zeros(len(zero), self.members, pixels, 2 + channels, device=zero.device)
        fitness = torch.full((len(zero), self.members), -torch.inf, dtype=torch.float64, device=zero.device)
        trial = _first(batch, zero, genes.shape[2:])
        return OnePixelState(_drawn(batch, trial), none, zero, genes, fitness, trial)

    def step(self, batch: Batch, state: OnePixelState, seen: Observation) -> OnePixelState:
        """Let the candidate replace its parent if it is no worse, and make the next."""
        value = named(self.loss)(seen.logits, batch).double().nan_to_num(-torch.inf, torch.inf, -torch.inf)
        rows, turn = torch.arange(len(value), device=value.device), state.k % self.members
        better = (value >= state.fitness[rows, turn]).nonzero().squeeze(1)
        at = better, turn[better]
        genes = state.genes.index_put(at, state.trial[better])
        fitness = state.fitness.index_put(at, value[better])
        k = state.k + 1
        trial = self._child(batch, k, genes)
        if (k < self.members).any():
            trial = torch.where(per_row(k < self.members, trial), _first(batch, k, trial.shape[1:]), trial)
        x = _drawn(batch, trial)
        return replace(state, x=x, k=k, genes=genes, fitness=fitness, trial=trial, done=k >= self.steps)

    def _child(self, batch: Batch, k: Tensor, genes: Tensor) -> Tensor:
        """x_a + scale (x_b - x_c), for three members that are none of them the parent."""
        rows = torch.arange(len(k), device=k.device)
        a, b, c = (genes[rows, (k + 1 + other) % self.members] for other in _three(batch.key, self.members - 1, k))
        child = a + self.scale * (b - c)
        fresh = noise.uniform(batch.key, child.shape[1:], 2 * k + 1)
        return torch.where((child < 0) | (child > 1), fresh, child)


def _three(key: Tensor, count: int, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three different (n,) numbers below `count`."""
    a, b, c = (
        (noise.uniform(key, (3,), 2 * k).double() * torch.arange(count, count - 3, -1, device=k.device)).long().T
    )
    b = b + (b >= a)
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    c = c + (c >= low)
    return a, b, c + (c >= high)


def _first(batch: Batch, k: Tensor, shape: torch.Size) -> Tensor:
    """Places drawn evenly; values around the middle of the range, with half of it for deviation."""
    places = noise.uniform(batch.key, (shape[0], 2), 2 * k)
    values = (0.5 + 0.5 * noise.normal(batch.key, (shape[0], shape[1] - 2), 2 * k + 1)).clamp(0.0, 1.0)
    return torch.cat([places, values], 2)


def _drawn(batch: Batch, trial: Tensor) -> Tensor:
    """The images with the pixels of (n, pixels, 2 + c) `trial` in them; where two meet, the later one counts."""
    channels, height, width = batch.x.shape[1:]
    row = (trial[..., 0] * height).long().clamp_max(height - 1)
    column = (trial[..., 1] * width).long().clamp_max(width - 1)
    here = (row * width + column)[..., None] == torch.arange(height * width, device=row.device)
    number = torch.arange(1, trial.shape[1] + 1, device=row.device)[:, None]
    last = (here * number).amax(1)  # (n, h w), 0 where no pixel is changed
    low, high = batch.threat.bounds
    values = (low + (high - low) * trial[..., 2:]).transpose(1, 2)
    chosen = values.gather(2, (last - 1).clamp_min(0)[:, None].expand(-1, channels, -1))
    x = torch.where((last > 0)[:, None], chosen, batch.x.flatten(2)).view_as(batch.x)
    return batch.project(x)
