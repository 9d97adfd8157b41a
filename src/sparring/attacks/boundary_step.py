"""The step of Brendel and Bethge's attack: to the point of a plane that is nearest to the image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sparring.core.batch import Rows

_TURNS = 60  # at most, in every search; a row that is exact keeps what it has, so no row waits on another
_EXACT = 1e-12  # relative
_ROUNDING = 1e-15  # relative: what a step loses by it where the multipliers are large
_NARROW = 1e-10  # relative: a bracket that can be left to its chord
_LEAP = 100.0  # times as far, until the root is bracketed
_SPREAD = 1e6  # times the lengths of a problem: as good as infinite; and its inverse as good as zero


class Spot(NamedTuple):
    """A step, and how it changes with each of two multipliers; all (n, d)."""

    step: Tensor
    by_p: Tensor
    by_t: Tensor


@dataclass(frozen=True)
class Problem(Rows, ABC):
    """Minimise ||s - home|| over the s with slope . s = rise, ||s||_2 <= radius and low <= s <= high.

    With two multipliers the minimisers are known: t puts them on the plane, and the larger p, the longer they are.
    """

    home: Tensor  # (n, d) from low to high; all is float64
    slope: Tensor  # (n, d) unit vectors
    low: Tensor  # (n, d) <= 0
    high: Tensor  # (n, d) >= 0
    rise: Tensor  # (n, 1) >= 0
    radius: Tensor  # (n, 1)

    @abstractmethod
    def spot(self, p: Tensor, t: Tensor) -> Spot:
        """The minimiser with the multipliers p and t (n, 1)."""

    @abstractmethod
    def nearest(self) -> tuple[Tensor, Tensor]:
        """The minimiser whatever its length (n, d), and its p (n, 1)."""

    @abstractmethod
    def begin(self, shortest: Tensor) -> Tensor:
        """(n, 1) the largest p for which the step is the shortest there is."""

    @property
    def shortest(self) -> Tensor:
        """(n, 1) the p of the shortest steps."""
        return torch.zeros_like(self.rise)

    @cached_property
    def size(self) -> Tensor:
        """(n, 1) the lengths at hand."""
        return self.radius + _dot(self.home, self.home).sqrt()

    @property
    def exact(self) -> Tensor:
        """(n, 1) lengths that are as good as zero."""
        return _EXACT * self.size


class L2Problem(Problem):
    """s = clip(p home + t slope), p from 0 to 1."""

    def spot(self, p: Tensor, t: Tensor) -> Spot:
        """The point and its derivatives."""
        moved = p * self.home + t * self.slope
        step = moved.clamp(self.low, self.high)
        free = step == moved
        return Spot(step, self.home * free, self.slope * free)

    def nearest(self) -> tuple[Tensor, Tensor]:
        """At p = 1."""
        one = torch.ones_like(self.rise)
        return self.spot(one, _meet(self, one, self.rise)).step, one

    def begin(self, shortest: Tensor) -> Tensor:
        """At 0."""
        return self.shortest


class LinfProblem(Problem):
    """s = clip(t slope), inside the cube around home that reaches -p, too."""

    def spot(self, p: Tensor, t: Tensor) -> Spot:
        """The point and its derivatives."""
        moved, top, bottom = t * self.slope, self.home - p, self.home + p
        step = moved.clamp(torch.maximum(self.low, bottom), torch.minimum(self.high, top))
        above, below = (moved >= top) & (top <= self.high), (moved <= bottom) & (bottom >= self.low)
        return Spot(step, below.double() - above.double(), self.slope * ((step == moved) & ~above & ~below))

    def nearest(self) -> tuple[Tensor, Tensor]:
        """From home every pixel goes the same way towards the plane, or to its bound if that is nearer."""
        missing = self.rise - _dot(self.slope, self.home)
        slope = self.slope * torch.where(missing < 0, -1.0, 1.0)
        room = torch.where(slope > 0, self.high - self.home, self.home - self.low)
        gain, reach = slope.abs(), torch.zeros_like(missing)
        for _ in range(_TURNS):  # from below: the more pixels are at a bound, the further the others go
            held = room <= reach
            before, reach = reach, (missing.abs() - _dot(gain, room * held)) / _dot(gain, (~held).double())
            reach = torch.maximum(reach.nan_to_num(0.0, 0.0, 0.0), before)
            if torch.equal(reach, before):  # of a row that has settled nothing changes any more
                break
        return self.home + slope.sign() * torch.minimum(room, reach), -reach

    @property
    def shortest(self) -> Tensor:
        """No cube."""
        return torch.full_like(self.rise, -torch.inf)

    def begin(self, shortest: Tensor) -> Tensor:
        """Where the cube just holds the shortest step."""
        return -(shortest - self.home).abs().amax(1, keepdim=True)


class L1Problem(Problem):
    """s = clip(home, t slope - p, t slope + p), clipped: the larger p, the more pixels are at home."""

    def spot(self, p: Tensor, t: Tensor) -> Spot:
        """The point and its derivatives."""
        even = t * self.slope
        away = self.home - even
        moved = torch.where(away.abs() < p, self.home, even + away.sign() * p)
        step = moved.clamp(self.low, self.high)
        free = (step == moved) & (away.abs() >= p)
        return Spot(step, away.sign() * free, self.slope * free)

    def nearest(self) -> tuple[Tensor, Tensor]:
        """From home the pixels with the steepest slope go all the way, one after the other; p has no end."""
        missing = self.rise - _dot(self.slope, self.home)
        slope = self.slope * torch.where(missing < 0, -1.0, 1.0)
        room = torch.where(slope > 0, self.high - self.home, self.low - self.home).masked_fill(slope == 0, 0.0)
        order = slope.abs().argsort(dim=1, descending=True, stable=True)
        gain = (slope * room).gather(1, order)
        share = ((missing.abs() - (gain.cumsum(1) - gain)) / gain).nan_to_num(0.0).clamp(0.0, 1.0)
        change = torch.zeros_like(room).scatter(1, order, share * room.gather(1, order))
        return self.home + change, _SPREAD * self.size

    def begin(self, shortest: Tensor) -> Tensor:
        """As good as 0, and larger, so that a geometric mean is at hand."""
        return self.size / _SPREAD


PROBLEMS: dict[str, type[Problem]] = {"l2": L2Problem, "linf": LinfProblem, "l1": L1Problem}


def boundary_step(
    norm: str, x: Tensor, origin: Tensor, slope: Tensor, rise: Tensor, radius: Tensor, bounds: tuple[float, float]
) -> Tensor:
    """(n, d) the step from `x` to the point of a plane nearest to `origin` in `norm`, within trust region and box.

    Brendel et al. 2019, equation 1: minimise ||x + s - origin|| with `slope` . s = `rise`, ||s||_2 <= `radius` and
    x + s inside `bounds`; where no such s is, the s in ball and box that comes nearest to the plane. All float64:
    images `x` and `origin` and unit vectors `slope` (n, d), `rise` and `radius` (n, 1).
    """
    sign = torch.where(rise < 0, -1.0, 1.0).double()
    problem = PROBLEMS[norm](origin - x, sign * slope, bounds[0] - x, bounds[1] - x, rise.abs(), radius)
    step = _climb(problem)
    within = _rows(problem.rise < _dot(problem.slope, step))
    if not len(within):
        return step
    problem = problem.take(within)
    near, p = problem.nearest()
    far = _rows(near.norm(dim=1, keepdim=True) > problem.radius)
    if len(far):
        near = near.index_copy(0, far, _shorten(problem.take(far), near[far], p[far]))
    return step.index_copy(0, within, near)


def _climb(problem: Problem) -> Tensor:
    """The step in ball and box that goes furthest up: clip(t slope) for the largest t that the ball allows.

    t is found from below: with the pixels that the box holds fixed, the others are scaled to fill the ball.
    """
    slope, t = problem.slope, problem.radius
    for _ in range(_TURNS):
        moved = t * slope
        step = moved.clamp(problem.low, problem.high)
        free = step == moved
        fixed, loose = _dot(step, step * ~free), _dot(slope, slope * free)
        longer = ((problem.radius.square() - fixed).clamp_min(0) / loose).sqrt()
        before, t = t, torch.where(loose > 0, torch.maximum(t, longer), t)
        if torch.equal(t, before):  # of a row that has settled nothing changes any more
            break
    return (t * slope).clamp(problem.low, problem.high)


def _shorten(problem: Problem, long: Tensor, q: Tensor) -> Tensor:
    """The step of length `radius` on the path from the shortest to the one that is `long`, at q.

    The path consists of pieces of lines, and Newton's method ends as soon as it comes by the right one. Chords lie on
    the plane and in the box whatever is left of the bracket.
    """
    radius = problem.radius
    t = _meet(problem, problem.shortest, problem.rise)
    short = problem.spot(problem.shortest, t).step
    at = p = problem.begin(short)
    spot = problem.spot(at, t)
    settled = torch.zeros_like(p, dtype=torch.bool)
    for turn in range(_TURNS):
        bend = -_dot(problem.slope, spot.by_p) / _dot(problem.slope, spot.by_t)  # of t by p, on the plane
        newton = at + _until(spot.step, spot.by_p + bend * spot.by_t, radius)
        safe = (newton > p) & (newton < q) & (turn % 5 < 4)
        move = torch.where(settled, 0.0, torch.where(safe, newton, _between(p, q)) - at)
        at, t = at + move, _meet(problem, at + move, torch.where(safe & ~settled, t + bend * move, t))
        spot = problem.spot(at, t)
        over = spot.step.norm(dim=1, keepdim=True) - radius
        inward, outward = (over <= 0) & ~settled, (over > 0) & ~settled
        short, p = torch.where(inward, spot.step, short), torch.where(inward, at, p)
        long, q = torch.where(outward, spot.step, long), torch.where(outward, at, q)
        settled = settled | (over.abs() <= problem.exact) | (q - p <= _NARROW * q.abs())
        if settled.all():
            break
    return short + _until(short, long - short, radius).clamp_max(1.0) * (long - short)


def _meet(problem: Problem, p: Tensor, t: Tensor) -> Tensor:
    """The t whose step is on the plane: Newton's method in a bracket, as slope . step rises along pieces of lines."""
    found, rows = t, torch.arange(len(t), device=t.device)
    below, above = t - torch.inf, t + torch.inf
    for turn in range(_TURNS):
        spot = problem.spot(p, t)
        gap = problem.rise - _dot(problem.slope, spot.step)
        below, above = torch.where(gap > 0, t, below), torch.where(gap < 0, t, above)
        newton = t + gap / _dot(problem.slope, spot.by_t)
        safe = (newton > below) & (newton < above) & (turn % 5 < 4)
        middle = _between(below, above)
        other = torch.where(middle.isfinite(), middle, t + gap.sign() * _LEAP * (t.abs() + gap.abs()))
        found = found.index_copy(0, rows, t)
        left = _rows(gap.abs() > problem.exact + _ROUNDING * t.abs())
        if not len(left):
            break
        t = torch.where(safe, newton, other)
        if len(left) < len(rows):
            problem, rows, p, t = problem.take(left), rows[left], p[left], t[left]
            below, above = below[left], above[left]
    return found


def _between(low: Tensor, high: Tensor) -> Tensor:
    """The geometric mean where both have one sign, else the arithmetic one."""
    product = low * high
    return torch.where(product > 0, low.sign() * product.sqrt(), (low + high) / 2)


def _until(step: Tensor, way: Tensor, radius: Tensor) -> Tensor:
    """(n, 1) how many times `way`, which leads outward, brings `step` to the length `radius`."""
    square, half, missing = _dot(way, way), _dot(way, step), radius.square() - _dot(step, step)
    root = (half.square() + square * missing).clamp_min(0.0).sqrt()
    return missing / (half + root).clamp_min(torch.finfo(root.dtype).tiny)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(n, 1) inner products."""
    return (a * b).sum(1, keepdim=True)


def _rows(where: Tensor) -> Tensor:
    """The rows (m,) for which (n, 1) says so."""
    return where.squeeze(1).nonzero().squeeze(1)
