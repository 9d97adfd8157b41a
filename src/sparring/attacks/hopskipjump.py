"""HopSkipJump: labels alone tell how the decision boundary lies, and where along it the image is nearer."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from sparring.core import noise
from sparring.core.attack import Observation, State
from sparring.core.batch import Batch, per_row
from sparring.core.model import Access

S = TypeVar("S", bound=State)

_START, _HALVE, _SAMPLE, _LEAP = range(4)


@dataclass(frozen=True)
class HopSkipJumpState(State):
    """Each row's place in the algorithm; `x` may lie outside the ball, but the last point does not."""

    k: Tensor  # (n,) queries answered
    phase: Tensor  # (n,) what the next answer is for
    t: Tensor  # (n,) rounds begun, from 1
    far: Tensor  # (n, c, h, w) a point that fools: where the search for the boundary sets out
    base: Tensor  # (n, c, h, w) the point of this round at the boundary; it fools
    low: Tensor  # (n,) float64 share of the way to `far` that does not fool
    high: Tensor  # (n,) float64 one that does
    toward: Tensor  # (n, c, h, w) the sum of the probes that fool, and then the direction taken
    drift: Tensor  # (n, c, h, w) the sum of all probes
    count: Tensor  # (n,) probes answered
    hits: Tensor  # (n,) of which fool
    size: Tensor  # (n,) float64 length of the probes, and then of the leap


@dataclass(frozen=True)
class HopSkipJump:
    """Halve the way to the boundary, probe which way it faces, leap into the wrong class, and again.

    Chen, Jordan and Wainwright 2020, algorithm 2, with the mean taken off the estimate, `initial` sqrt(t) probes in
    round t, and their settings of probe length and tolerance; but `initial` is not 100 unless given, as in a few
    thousand queries more rounds are worth more than a better aim: it is 30, and in Linf, where the sign of every
    feature counts, up to 100 by three times the root of their number. Here a random image to start from is sought on
    coarser and coarser squares if pixels do not do, or is the point that is given.
    """

    steps: int = 5000
    initial: int | None = None
    tries: int = 100

    name: ClassVar[str] = "hopskipjump"
    version: ClassVar[int] = 2
    needs: ClassVar[Access] = Access.DECISION
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "unbounded")
    paper: ClassVar[str] = "Chen et al. 2020, arXiv:1904.02144"
    minimizes: ClassVar[bool] = True
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> HopSkipJumpState:
        """Ask about a first random image."""
        zero, still = torch.zeros_like(batch.y), torch.zeros_like(batch.x)
        share = torch.zeros_like(batch.y, dtype=torch.float64)
        x = guess(batch, zero)
        return HopSkipJumpState(
            x, torch.zeros_like(batch.targeted), zero, zero, zero, x, x, share, share, still, still, zero, zero, share
        )

    def step(self, batch: Batch, state: HopSkipJumpState, seen: Observation) -> HopSkipJumpState:
        """Each row goes on with what it is at."""
        fooled, after = fools(batch, seen), state
        for phase, move in enumerate((self._start, self._halve, self._sample, self._leap)):
            rows = (state.phase == phase).nonzero().squeeze(1)
            if len(rows) == len(fooled):
                after = move(batch, state, fooled)
            elif len(rows):
                after = after.put(rows, move(batch.take(rows), state.take(rows), fooled[rows]))
        k = state.k + 1
        lost = (after.phase == _START) & (k >= self.tries)
        return ending(batch, replace(after, k=k), (k >= self.steps) | lost)

    def _start(self, batch: Batch, state: HopSkipJumpState, fooled: Tensor) -> HopSkipJumpState:
        again = replace(state, x=guess(batch, state.k + 1))
        return choose(fooled, self._set_out(batch, state), again)

    def _set_out(self, batch: Batch, state: HopSkipJumpState) -> HopSkipJumpState:
        """Begin a round at a point that fools: seek the boundary between it and the image."""
        low = torch.zeros_like(state.low)
        x = between(batch, state.x, low + 0.5)
        phase = torch.full_like(state.phase, _HALVE)
        return replace(state, x=x, phase=phase, t=state.t + 1, far=state.x, low=low, high=low + 1)

    def _halve(self, batch: Batch, state: HopSkipJumpState, fooled: Tensor) -> HopSkipJumpState:
        d = batch.x[0].numel()
        middle = (state.low + state.high) / 2
        low, high = torch.where(fooled, state.low, middle), torch.where(fooled, middle, state.high)
        found = high - low <= max(d ** (-2.0 if batch.threat.norm == "linf" else -1.5), 1e-7)
        base = between(batch, state.far, high)
        lowest, highest = batch.threat.bounds
        length = batch.threat.distance(state.far, batch.x) / d
        # Probes shorter than a pixel's rounding would not move it at all.
        length = length.clamp_min(1e-6 * math.sqrt(d) * (highest - lowest))
        length = torch.where(state.t == 1, 0.1 * (highest - lowest), length)
        state = replace(state, low=low, high=high, base=base, size=length)
        zero, still = torch.zeros_like(state.count), torch.zeros_like(state.base)
        x = torch.where(per_row(found, base), self._probe(batch, state), between(batch, state.far, (low + high) / 2))
        phase = torch.where(found, _SAMPLE, state.phase)
        return replace(state, x=x, phase=phase, toward=still, drift=still, count=zero, hits=zero)

    def _probe(self, batch: Batch, state: HopSkipJumpState) -> Tensor:
        """Somewhere on a small sphere around `base`."""
        way = _unit(noise.normal(batch.key, batch.x.shape[1:], state.k))
        return batch.threat.clip(state.base + _scaled(state.size, way))

    def _sample(self, batch: Batch, state: HopSkipJumpState, fooled: Tensor) -> HopSkipJumpState:
        probe = _scaled(1 / state.size, state.x - state.base)  # as clipped
        toward, drift = state.toward + per_row(fooled, probe) * probe, state.drift + probe
        count, hits = state.count + 1, state.hits + fooled
        state = replace(state, toward=toward, drift=drift, count=count, hits=hits)
        enough = count >= (self._first(batch) * state.t.double().sqrt()).long()
        share = per_row((hits / count).float(), drift)
        way = torch.where(share == 1, drift, toward - share * drift)  # -drift where none fools
        way = way.sign() if batch.threat.norm == "linf" else _unit(way)
        size = batch.threat.distance(state.base, batch.x) / state.t.double().sqrt()
        leap = batch.threat.clip(state.base + _scaled(size, way))
        x = torch.where(per_row(enough, way), leap, self._probe(batch, state))
        toward = torch.where(per_row(enough, way), way, toward)
        phase = torch.where(enough, _LEAP, state.phase)
        return replace(state, x=x, phase=phase, toward=toward, size=torch.where(enough, size, state.size))

    def _first(self, batch: Batch) -> int:
        """How many probes the first round makes."""
        if self.initial is not None:
            return self.initial
        grown = round(3 * math.sqrt(batch.x[0].numel()))
        return min(max(grown, 30), 100) if batch.threat.norm == "linf" else 30

    def _leap(self, batch: Batch, state: HopSkipJumpState, fooled: Tensor) -> HopSkipJumpState:
        onward = self._set_out(batch, state)
        size = torch.where(fooled, state.size, state.size / 2)
        shorter = replace(state, x=batch.threat.clip(state.base + _scaled(size, state.toward)), size=size)
        return choose(fooled, onward, shorter)


def fools(batch: Batch, seen: Observation) -> Tensor:
    """(n,) bool: does the model answer as the attacker wants, however far away the point lies?"""
    return (seen.labels == batch.label) == batch.targeted


def guess(batch: Batch, k: Tensor) -> Tensor:
    """The k-th image to start from: the one given, or noise on squares of 1, 2, 4, ... pixels in turn."""
    height, width = batch.x.shape[2:]
    sides = 2 ** (k % max(1, min(height, width).bit_length() - 1))
    pixels = noise.uniform(batch.key, batch.x.shape[1:], k)
    down = (torch.arange(height, device=k.device) // sides[:, None])[:, None, :, None].expand_as(pixels)
    across = (torch.arange(width, device=k.device) // sides[:, None])[:, None, None, :].expand_as(pixels)
    low, high = batch.threat.bounds
    x = low + (high - low) * pixels.gather(2, down).gather(3, across)
    return x if batch.start is None else torch.where(per_row(k == 0, x), batch.start, x)


def between(batch: Batch, far: Tensor, share: Tensor) -> Tensor:
    """`share` (n,) of the way from the images to `far`: straight, or in Linf `far` clipped to so large a cube."""
    if batch.threat.norm == "linf":
        return batch.threat.within(far, batch.x, (share * batch.threat.distance(far, batch.x)).float())
    return batch.threat.clip(batch.x + _scaled(share, far - batch.x))


def choose(where: Tensor, one: S, other: S) -> S:
    """The rows of `one` where `where` (n,), else those of `other`."""
    return one._map(lambda name, tensor: torch.where(per_row(where, tensor), tensor, getattr(other, name)))


def ending(batch: Batch, state: S, done: Tensor) -> S:
    """The `state` of rows that are `done` (n,), whose last points are legal, and of the others."""
    if not done.any():
        return state
    return replace(state, x=torch.where(per_row(done, state.x), batch.project(state.x), state.x), done=done)


def _scaled(size: Tensor, way: Tensor) -> Tensor:
    return per_row(size.to(way.dtype), way) * way


def _unit(way: Tensor) -> Tensor:
    """`way` over its L2 norm; zero where that is zero."""
    length = way.flatten(1).double().norm(dim=1)
    return _scaled(1 / length.clamp_min(1e-30), way)
