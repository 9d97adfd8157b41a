"""Straight lines below and above an activation on an interval."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.certificates.operators import Activation, Interval
from sparring.core.batch import Rows


@dataclass(frozen=True)
class Lines(Rows):
    """low_slope z + low_shift <= f(z) <= high_slope z + high_shift; (n, *shape) each, or (n, questions, *shape)."""

    low_slope: Tensor | None  # None: zero
    low_shift: Tensor | None
    high_slope: Tensor | None
    high_shift: Tensor

    def pull(self, a: Tensor) -> tuple[Tensor | None, Tensor]:
        """The linear function below a . f(z), for `a` (n, s, *shape): its slopes (None: zero) and constants (n, s).

        Where `a` is positive the line below f counts, where it is negative the one above (Zhang et al. 2018, 3.2).
        """
        constant = _dot(a.clamp_max(0.0), self.high_shift)
        if self.low_shift is not None:
            constant = constant + _dot(a.clamp_min(0.0), self.low_shift)
        if self.low_slope is None or self.high_slope is None:
            return None, constant
        return a * torch.where(a >= 0, _asked(self.low_slope, a), _asked(self.high_slope, a)), constant


def relax(op: Activation, bounds: Interval) -> Lines:
    """The lines that suit `op` for arguments in `bounds`."""
    if op.steps:  # a box leaves each entry its two ends, and no line says more
        return flat(op, bounds)
    low, high = bounds
    return _relu(low, high) if op.kind == "relu" else _s_shaped(op, low, high)


def flat(op: Activation, bounds: Interval) -> Lines:
    """Constants: what an interval says, and all that interval propagation uses."""
    low, high = (op.forward(end) for end in bounds)
    return Lines(None, low, None, high)


def unstable(bounds: Interval) -> Tensor:
    """Where a ReLU is neither always on nor always off."""
    return (bounds[0] < 0) & (bounds[1] > 0)


def bent(op: Activation, bounds: Interval) -> Tensor:
    """Where tighter `bounds` of its argument can make the lines around `op` tighter."""
    if op.steps:
        return op.forward(bounds[0]) < op.forward(bounds[1])
    return unstable(bounds) if op.kind == "relu" else bounds[0] < bounds[1]


def _relu(low: Tensor, high: Tensor) -> Lines:
    """The chord above; below, z or 0, whichever leaves less area (Zhang et al. 2018, section 3.3)."""
    split = unstable((low, high))
    on = (low >= 0).to(low.dtype)
    slope = torch.where(split, high / torch.where(split, high - low, torch.ones_like(low)), on)
    shift = torch.where(split, -slope * low, torch.zeros_like(low))
    return Lines(torch.where(split, (high > -low).to(low.dtype), on), None, slope, shift)


def _s_shaped(op: Activation, low: Tensor, high: Tensor) -> Lines:
    """Chords and tangents (Zhang et al. 2018, table 2); the line below is the one above, turned around."""
    centre = 1.0 if op.kind == "sigmoid" else 0.0  # f(z) = centre - f(-z)
    high_slope, high_shift = _above(op, low, high)
    low_slope, turned = _above(op, -high, -low)
    return Lines(low_slope, centre - turned, high_slope, high_shift)


def _slope(op: Activation, z: Tensor) -> Tensor:
    f = op.forward(z)
    return f * (1 - f) if op.kind == "sigmoid" else 1 - f.square()


def _above(op: Activation, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and shift of a line above f, which is convex left of zero and concave right of it.

    The chord, if f is steeper than it at the right end; else the tangent at the middle of an interval right of
    zero, or at the leftmost point right of zero from which the tangent is still above f at `low` (bisection, from
    the safe side).
    """
    f_low, f_high = op.forward(low), op.forward(high)
    width = high - low
    narrow = width < 1e-4
    chord = (f_high - f_low) / torch.where(narrow, torch.ones_like(width), width)
    with torch.no_grad():
        left, right = low.clamp_min(0.0), high.clamp_min(0.0)
        for _ in range(20):
            point = (left + right) / 2
            safe = op.forward(point) + _slope(op, point) * (low - point) >= f_low
            left, right = torch.where(safe, left, point), torch.where(safe, point, right)
        point = torch.where(low >= 0, (low + high) / 2, right)
    tangent = _slope(op, point)
    by_chord = (_slope(op, high) >= chord) & (high > 0) | (high <= 0)
    slope = torch.where(by_chord, chord, tangent)
    shift = torch.where(by_chord, f_low - chord * low, op.forward(point) - tangent * point)
    slope = torch.where(narrow, torch.zeros_like(slope), slope)
    # Tangents and chords are rounded; the line is moved up by more than that.
    spare = 16 * torch.finfo(low.dtype).eps * (1 + low.abs() + high.abs())
    return slope, torch.where(narrow, f_high, shift) + spare


def _asked(values: Tensor, a: Tensor) -> Tensor:
    """(n, *shape) or (n, s, *shape) `values` to broadcast against `a` (n, s, *shape)."""
    return values.unsqueeze(1) if values.dim() < a.dim() else values


def _dot(a: Tensor, values: Tensor) -> Tensor:
    """(n, s) sums of `a` (n, s, *shape) times `values` (n, *shape) or (n, s, *shape)."""
    if values.dim() < a.dim():
        return torch.bmm(a.flatten(2), values.flatten(1).unsqueeze(2)).squeeze(2)
    return (a * values).flatten(2).sum(2)
