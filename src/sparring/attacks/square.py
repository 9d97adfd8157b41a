"""Square: random search with square patches. It asks for scores only, so nothing hides from it behind gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.core import noise
from sparring.core.attack import Observation, State
from sparring.core.batch import Batch, per_row
from sparring.core.losses import margin
from sparring.core.model import Access

_HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)  # shares of the steps at which `p` halves
AHEAD = 48  # squares drawn at once
_STRIDE = (0.7548776662466927, 0.5698402909980532)  # 1 / r and 1 / r^2, where r^3 = r + 1
_SHIFT = -1  # the stream of where the places begin; steps are from 0 on


@dataclass(frozen=True)
class SquareState(State):
    """The best point of each row, and how good it is."""

    k: Tensor  # (n,) proposals judged
    best: Tensor  # (n, c, h, w)
    value: Tensor  # (n,) margin at `best`
    plan: Tensor  # (n, AHEAD, 5 + 2 c) the next squares: side, places of window and other, signs, upright or not


@dataclass(frozen=True)
class Square:
    """Push a random square of the best point as far as it goes; keep the result if the margin grew.

    Andriushchenko et al. 2020, algorithms 1 to 3, with these differences: every row has a square of its own,
    L1 is treated as L2 is, and the window's pattern in L2 and L1 falls off around each half's middle by a
    closed form in place of nested rectangles. A row's squares lie evenly over the image, at shifted multiples of
    the plastic number's powers (Roberts 2018, the sequence R2), and one that would change nothing in Linf takes the
    opposite signs. Squares cover the share `p` of the image at first; by the
    paper's plan it halves at fixed shares of the steps. With `mixed`, sides are instead drawn between 1 and
    a greatest one that falls evenly, which suits a short search. With `warm`, it begins at the point it is
    given, else at vertical stripes (in L2 and L1: at a grid of windows).
    """

    steps: int = 5000
    p: float = 0.8
    mixed: bool = False
    warm: bool = False

    name: ClassVar[str] = "square"
    version: ClassVar[int] = 2
    needs: ClassVar[Access] = Access.SCORE
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")
    paper: ClassVar[str] = "Andriushchenko et al. 2020, arXiv:1912.00049"
    minimizes: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> SquareState:
        """Begin at the given point, or at stripes or windows that fill the budget."""
        x = batch.begin if self.warm else self._stripes(batch)
        zero = torch.zeros_like(batch.y)
        worst = torch.full_like(zero, -torch.inf, dtype=torch.float32)
        plan = torch.zeros(*zero.shape, AHEAD, 5 + 2 * x.shape[1], device=x.device)
        return SquareState(x, torch.zeros_like(batch.targeted), zero, x, worst, plan)

    def _stripes(self, batch: Batch) -> Tensor:
        channels, height, width = batch.x.shape[1:]
        if batch.threat.norm == "linf":
            signs = _signs(noise.uniform(batch.key, (channels, 1, width)))
            return batch.project(batch.x + batch.threat.eps * signs.expand_as(batch.x))
        side = max(1, height // 5)
        signs = _signs(noise.uniform(batch.key, (channels, -(-height // side), -(-width // side))))
        signs = signs.repeat_interleave(side, 2).repeat_interleave(side, 3)[:, :, :height, :width]
        rows = (torch.arange(height, device=batch.x.device) % side)[None]
        columns = (torch.arange(width, device=batch.x.device) % side)[None]
        upright = torch.ones_like(rows[:, :1], dtype=torch.bool)
        pattern = signs * _pattern(rows, columns, torch.full_like(rows[:, :1], side), upright)
        return batch.project(batch.x + batch.threat.eps * _normed(pattern, _power(batch)))

    def step(self, batch: Batch, state: SquareState, seen: Observation) -> SquareState:
        """Keep what was asked about if it was better, and propose the next square."""
        value = margin(seen.logits, batch)
        better = value > state.value
        rows = better.nonzero().squeeze(1)
        best = state.best.index_copy(0, rows, state.x[rows])
        k = state.k + 1
        place = (k - 1) % AHEAD
        due = (place == 0).nonzero().squeeze(1)
        plan = state.plan.index_copy(0, due, self._plan(batch, due, k[due])) if len(due) else state.plan
        x = self._propose(batch, best, plan[torch.arange(len(k), device=k.device), place])
        value = torch.where(better, value, state.value)
        return replace(state, x=x, best=best, value=value, k=k, done=k >= self.steps, plan=plan)

    def _plan(self, batch: Batch, rows: Tensor, k: Tensor) -> Tensor:
        """(m, AHEAD, 5 + 2 c) for the rows at (m,) `rows`: their squares from the k-th on."""
        channels, height, width = batch.x.shape[1:]
        steps = (k[:, None] + torch.arange(AHEAD, device=k.device)).flatten()
        keys = batch.key[rows].repeat_interleave(AHEAD)
        draws = noise.uniform(keys, (5 + 2 * channels,), steps)
        side = self._sides(draws[:, 0], steps, height, width)[:, None]
        room = torch.tensor([height, width, height, width], device=k.device) - side + 1
        places = (torch.cat([_spread(keys, steps), draws[:, 3:5]], 1) * room).floor()
        return torch.cat([side, places, _signs(draws[:, 5:])], 1).view(len(k), AHEAD, -1)

    def _sides(self, draw: Tensor, k: Tensor, height: int, width: int) -> Tensor:
        """(n,) float32 sides of the k-th squares."""
        share = (k / self.steps).clamp_max(1.0)
        if self.mixed:
            greatest = 1 + (math.sqrt(self.p * height * width) - 1) * (1 - share)
            side = greatest**draw
        else:
            halvings = torch.bucketize(share, torch.tensor(_HALVINGS, device=k.device))
            side = (self.p * 0.5**halvings * height * width).sqrt()
        return side.round().clamp(1, min(height, width))

    def _propose(self, batch: Batch, best: Tensor, square: Tensor) -> Tensor:
        """`best` with one `square` (n, 5 + 2 c) more in it."""
        channels, height, width = batch.x.shape[1:]
        side = square[:, :1]
        rows, columns = _places(square[:, 1:2], height), _places(square[:, 2:3], width)
        down, across = _inside(rows, side), _inside(columns, side)
        signs = square[:, 5 : 5 + channels, None, None]
        if batch.box is not None:
            window = down[:, None, :, None] & across[:, None, None, :]
            low, high = batch.box
            x = torch.where(window, torch.where(signs > 0, high, low), best)
            idle = (x == best).flatten(1).all(1).nonzero().squeeze(1)
            if len(idle):
                away = torch.where(signs[idle] > 0, low[idle], high[idle])
                x = x.index_copy(0, idle, torch.where(window[idle], away, best[idle]))
            return x
        window = _outer(down, across)
        other = _inside(_places(square[:, 3:4], height), side), _inside(_places(square[:, 4:5], width), side)
        pattern = signs * _pattern(rows, columns, side, square[:, 5 + channels, None] < 0)
        return self._shift_mass(batch, best, window, _outer(*other), pattern * window)

    def _shift_mass(self, batch: Batch, best: Tensor, window: Tensor, other: Tensor, pattern: Tensor) -> Tensor:
        """Take the change out of the `other` window, and put what it cost and what is unused into `window`."""
        power = _power(batch)
        delta = best - batch.x
        both = torch.maximum(window, other)
        rest = delta * (1 - both)
        mass = (batch.threat.eps**power - _mass(rest, power)).clamp_min(0)
        fresh = _normed(_normed(delta * window, power, channels=True) + pattern, power, channels=True)
        share = per_row(mass / batch.x.shape[1], delta) ** (1 / power)
        return batch.project(batch.x + rest + fresh * share)


def _spread(key: Tensor, k: Tensor) -> Tensor:
    """(n, 2) float32 in [0, 1): where the k-th squares of rows with (n,) `key` lie, in shares of the room."""
    shift = noise.uniform(key, (2,), _SHIFT).double()
    stride = torch.tensor(_STRIDE, dtype=torch.float64, device=key.device)
    # Rounding to float32 may give 1, which is outside.
    return ((shift + k[:, None] * stride) % 1).float().clamp_max(1 - 2**-24)


def _signs(draw: Tensor) -> Tensor:
    return torch.where(draw < 0.5, -1.0, 1.0)


def _places(first: Tensor, length: int) -> Tensor:
    """(n, length) distances of all places from where the window begins, at `first` (n, 1)."""
    return torch.arange(length, device=first.device) - first


def _inside(places: Tensor, side: Tensor) -> Tensor:
    return (places >= 0) & (places < side)


def _outer(down: Tensor, across: Tensor) -> Tensor:
    """(n, 1, h, w) float32: 1 where both (n, h) and (n, w) hold, else 0."""
    return down.float()[:, None, :, None] * across.float()[:, None, None, :]


def _pattern(rows: Tensor, columns: Tensor, side: Tensor, upright: Tensor) -> Tensor:
    """(n, 1, h, w) two bumps, one up and one down, in two halves of each window: one above the other if `upright`."""
    up, down = _bumps(rows, side, upright)
    left, right = _bumps(columns, side, ~upright)
    away = torch.maximum(up[:, None, :, None], left[:, None, None, :])
    return down[:, None, :, None] * right[:, None, None, :] / (1 + away)


def _bumps(places: Tensor, side: Tensor, split: Tensor) -> tuple[Tensor, Tensor]:
    """(n, length) distances from the middle, of either half where `split`, and the sign of the half."""
    first = places < side / 2
    middle = torch.where(first, side / 4, 3 * side / 4) - 0.5
    away = torch.where(split, (places - middle).abs() * 2, (places - (side - 1) / 2).abs())
    return away, torch.where(split & ~first, -1.0, 1.0)


def _power(batch: Batch) -> float:
    return 1.0 if batch.threat.norm == "l1" else 2.0


def _mass(delta: Tensor, power: float) -> Tensor:
    """(n,) the norm to its power."""
    return delta.abs().pow(power).flatten(1).sum(1)


def _normed(delta: Tensor, power: float, *, channels: bool = False) -> Tensor:
    """`delta` (n, c, h, w) over its norm, or each of its channels over its own."""
    over = (2, 3) if channels else (1, 2, 3)
    length = delta.abs().pow(power).sum(over, keepdim=True).pow(1 / power)
    return delta / length.clamp_min(1e-12)
