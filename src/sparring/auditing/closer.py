"""Coming closer: what turns a point that fools, or an attack within a budget, into a small distance."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.attacks.fab import FAB, FABState
from sparring.attacks.sprint import blocks
from sparring.core.attack import Observation, State
from sparring.core.batch import Batch, per_row
from sparring.core.losses import named
from sparring.core.model import Access

_SHRINKING = 0.6  # of a sprint goes by until its ball has its size
_NORMS = ("linf", "l2", "l1")


@dataclass(frozen=True)
class Onward:
    """FAB that does not stop at its first success, as its paper has it: the judge keeps the nearest of all."""

    attack: FAB

    name: ClassVar[str] = FAB.name
    version: ClassVar[int] = FAB.version
    needs: ClassVar[Access] = FAB.needs
    norms: ClassVar[tuple[str, ...]] = FAB.norms
    paper: ClassVar[str] = FAB.paper
    minimizes: ClassVar[bool] = True
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> FABState:
        """As FAB does."""
        return self.attack.init(batch)

    def step(self, batch: Batch, state: FABState, seen: Observation) -> FABState:
        """As FAB does."""
        return self.attack.step(batch, state, seen)


@dataclass(frozen=True)
class ShrinkState(State):
    """The part of the way that is left."""

    k: Tensor  # (n,) points asked about
    low: Tensor  # (n,) float64 a share of the way that does not fool
    high: Tensor  # (n,) float64 one that does


@dataclass(frozen=True)
class Shrink:
    """Halve the way from the image to a point that fools, `steps` times; labels are enough."""

    steps: int = 12

    name: ClassVar[str] = "shrink"
    version: ClassVar[int] = 1
    needs: ClassVar[Access] = Access.DECISION
    norms: ClassVar[tuple[str, ...]] = _NORMS
    paper: ClassVar[str] = "bisection"
    minimizes: ClassVar[bool] = True
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> ShrinkState:
        """Ask half-way."""
        low = torch.zeros(len(batch.y), dtype=torch.float64, device=batch.x.device)
        done = torch.full_like(batch.targeted, self.steps <= 1)
        return ShrinkState(self._at(batch, low + 0.5), done, torch.ones_like(batch.y), low, low + 1)

    def step(self, batch: Batch, state: ShrinkState, seen: Observation) -> ShrinkState:
        """Take the half that still holds the boundary."""
        middle = (state.low + state.high) / 2
        low, high = (
            torch.where(seen.adversarial, state.low, middle),
            torch.where(seen.adversarial, middle, state.high),
        )
        k = state.k + 1
        return ShrinkState(self._at(batch, (low + high) / 2), k >= self.steps, k, low, high)

    def _at(self, batch: Batch, share: Tensor) -> Tensor:
        return batch.threat.clip(batch.x + per_row(share.float(), batch.x) * (batch.begin - batch.x))


@dataclass(frozen=True)
class CloserState(State):
    """The nearest point that fooled, and the sprint towards a nearer one."""

    k: Tensor  # (n,) points asked about
    lap: Tensor  # (n,) steps taken in this sprint
    laps: Tensor  # (n,) sprints begun
    previous: Tensor  # (n, c, h, w) the point before
    nearest: Tensor  # (n, c, h, w) the nearest point that fooled, or the image itself
    high: Tensor  # (n,) float64 its distance; inf: none yet
    radius: Tensor  # (n,) float64 of the ball that this sprint stays in
    gap: Tensor  # (n,) float64 how much smaller the next ball is to be, as a share


@dataclass(frozen=True)
class Closer:
    """Sprints inside a ball that is always smaller than the nearest distance known, by a share that adapts.

    A search for the least eps at which an attack within a budget succeeds, as AttackBench (Cina et al. 2024,
    arXiv:2404.19460) runs APGD in Linf; but a row goes on from its nearest point, drawn into the smaller ball, and
    one sprint in `far` begins elsewhere: blocks pushed as far as the ball allows, in every second of these a ball
    `wide` times as wide, which shrinks as in `Sprint`. A sprint that fools ends there. The share grows by half after
    one that fools and halves after one that does not. While nothing has fooled, the ball doubles from `first`. The
    move is that of equations 3 and 4 of Croce and Hein 2020, but for one projection where they have two.
    """

    steps: int = 200
    first: float = 0.1
    lap: int = 8
    far: int = 2
    wide: float = 1.0
    loss: str = "log_odds"
    largest: float = 0.2
    least: float = 0.001
    momentum: float = 0.75

    name: ClassVar[str] = "closer"
    version: ClassVar[int] = 1
    needs: ClassVar[Access] = Access.GRADIENT
    norms: ClassVar[tuple[str, ...]] = _NORMS
    paper: ClassVar[str] = "Croce and Hein 2020, arXiv:2003.01690; Cina et al. 2024, arXiv:2404.19460"
    minimizes: ClassVar[bool] = True
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> CloserState:
        """Draw the given point a little nearer; without one, begin somewhere in the first ball."""
        zero = torch.zeros_like(batch.y)
        length = batch.threat.distance(batch.begin, batch.x)
        high = torch.where(length > 0, length, torch.inf)
        gap = torch.full_like(length, self.largest / 2)
        radius = torch.where(high < torch.inf, high * (1 - gap), self.first)
        state = CloserState(
            batch.x, torch.zeros_like(batch.targeted), zero, zero, zero, batch.x, batch.begin, high, radius, gap
        )
        return self._set_out(batch, state)

    def step(self, batch: Batch, state: CloserState, seen: Observation) -> CloserState:
        """Climb; at the end of a sprint choose the next ball."""
        _, gradient = seen.value_and_grad(named(self.loss))
        length = batch.threat.distance(state.x, batch.x)
        fooled = seen.adversarial & (length < state.high)
        lap, k = state.lap + 1, state.k + 1
        over = fooled | (lap >= self._length(state))
        x = self._climb(batch, state, gradient)
        after = replace(state, x=x, previous=state.x, lap=lap, k=k, done=k >= self.steps)
        if not over.any():
            return after
        high = torch.where(fooled, length, state.high)
        nearest = torch.where(per_row(fooled, x), state.x, state.nearest)
        gap = torch.where(fooled, state.gap * 1.5, state.gap / 2).clamp(self.least, self.largest)
        gap = torch.where(state.high < torch.inf, gap, state.gap)
        radius = torch.where(high < torch.inf, high * (1 - gap), 2 * state.radius)
        begun = replace(after, laps=state.laps + 1, nearest=nearest, high=high, radius=radius, gap=gap)
        begun = self._set_out(batch, replace(begun, lap=torch.zeros_like(lap)))
        return after._map(lambda name, tensor: torch.where(per_row(over, tensor), getattr(begun, name), tensor))

    def _warm(self, state: CloserState) -> Tensor:
        """(n,) bool: does this sprint begin at the nearest point?"""
        return (state.laps % self.far != self.far - 1) & (state.high < torch.inf)

    def _width(self, state: CloserState) -> Tensor:
        """(n,) how many times as wide the ball is at first: one in two sprints that begin elsewhere is `wide`."""
        narrow = self._warm(state) | (state.laps // self.far % 2 == 1)
        return torch.where(narrow, 1.0, self.wide)

    def _length(self, state: CloserState) -> Tensor:
        return torch.where(self._warm(state), self.lap, 2 * self.lap)

    def _set_out(self, batch: Batch, state: CloserState) -> CloserState:
        """The state at the first point of a sprint."""
        radius = (state.radius * self._width(state)).to(batch.x.dtype)
        reach = per_row(radius, batch.x)
        key = batch.key + state.laps * 0x5DEECE66D
        away = batch.x + reach * blocks(key, batch.x.shape[1:], 4)
        x = torch.where(per_row(self._warm(state), batch.x), state.nearest, away)
        x = batch.threat.within(x, batch.x, radius)
        return replace(state, x=x, previous=x)

    def _climb(self, batch: Batch, state: CloserState, gradient: Tensor) -> Tensor:
        """`Sprint`'s move, in a ball of the row's own radius, which is at first wider where it began elsewhere."""
        warm, length = self._warm(state), self._length(state)
        size = state.radius * torch.where(warm, 0.3, 2.0) * (1 - state.lap / length)
        times = 1 + (self._width(state) - 1) * (1 - (state.lap + 1) / (_SHRINKING * length)).clamp_min(0.0)
        share = per_row(torch.where(state.lap > 0, self.momentum, 1.0), state.x)
        step = per_row((size * times).to(state.x.dtype), state.x) * batch.threat.steepest(gradient, state.x)
        x = state.x + share * step + (1 - share) * (state.x - state.previous)
        return batch.threat.within(x, batch.x, (state.radius * times).to(state.x.dtype))
