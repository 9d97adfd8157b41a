"""Nearest: two scouts, one from the clean image and one from far away, then a finer walk from the nearer find."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.attacks.deepfool import is_fooled
from sparring.core import noise
from sparring.core.attack import Observation, State
from sparring.core.batch import Batch, per_row
from sparring.core.losses import cross_entropy, margin
from sparring.core.model import Access

_DUALS = {"linf": 1.0, "l2": 2.0, "l1": math.inf}
_BEYOND = 2.0  # times the way to the linearised boundary: where the first ball ends
_OUT = 0.5  # a radius grows by so much while nothing has been found
_COARSE, _FINE, _LAST = 0.3, 0.05, 0.002  # how fast it changes: at first, when the scouts are back, at the end
_LONG, _MIDDLE, _SHORT = 1.0, 0.3, 0.01  # steps, in radii, at these times


@dataclass(frozen=True)
class NearestState(State):
    """Where the search stands."""

    k: Tensor  # (n,) steps taken
    radius: Tensor  # (n,) float64 how far from the clean image the next point may lie
    nearest: Tensor  # (n,) float64 distance of `best`; inf before the first success
    best: Tensor  # (n, c, h, w) the nearest point that fooled


@dataclass(frozen=True)
class Nearest:
    """Steepest steps inside a ball that shrinks where the model is fooled and grows where it is not.

    The direction and the norm are decoupled as in DDN (Rony et al. 2019, algorithm 1), in every norm, with
    the change of the radius falling as in FMN (Pintor et al. 2021, algorithm 1) and steps in units of the radius. A
    quarter of the steps sets out from the clean image, in a ball twice as wide as the way to the linearised
    boundary, or `near` of the way to the farthest image if that is less; a quarter from random signs on all features,
    `far` of that way in length, since gradients that vanish near the image return further out (as FAB's random
    starts and the wide balls of "Mind the box" use: Croce and Hein 2020 and 2021); the other half refines the
    nearest of what both have found.
    The scouts climb cross-entropy, which sees all classes; the first step and the refining half climb the margin,
    whose gradient is the normal of the boundary.
    """

    steps: int = 100
    near: float = 0.1
    far: float = 0.5

    name: ClassVar[str] = "nearest"
    version: ClassVar[int] = 2
    needs: ClassVar[Access] = Access.GRADIENT
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")
    paper: ClassVar[str] = "Rony et al. 2019, arXiv:1811.09600; Pintor et al. 2021, arXiv:2102.12827"
    minimizes: ClassVar[bool] = True
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> NearestState:
        """Start at the clean image, with a ball that reaches `near` of the way to the farthest image."""
        k, radius = torch.zeros_like(batch.y), self.near * _farthest(batch)
        return NearestState(
            batch.x, torch.zeros_like(batch.targeted), k, radius, torch.full_like(radius, torch.inf), batch.x
        )

    def step(self, batch: Batch, state: NearestState, seen: Observation) -> NearestState:
        """Fit the ball, and climb inside it; when a quarter is over the next part of the search begins."""
        first = state.k == 0
        scouting = (state.k < 2 * (self.steps // 4)) & ~first

        def goal(logits: Tensor, rows: Batch) -> Tensor:
            return torch.where(scouting, cross_entropy(logits, rows), margin(logits, rows).double())

        value, gradient = seen.value_and_grad(goal)
        change, size = self._plan(state.k)
        length = batch.threat.distance(state.x, batch.x)
        # Beyond eps the judge says no, yet it is the distance that is to shrink there.
        fooled = seen.adversarial | (is_fooled(batch, seen) & (length > batch.threat.eps))
        closer = fooled & (length < state.nearest)
        best = torch.where(per_row(closer, state.x), state.x, state.best)
        nearest = torch.where(closer, length, state.nearest)
        growth = torch.where(nearest < torch.inf, change, _OUT)
        slope = gradient.flatten(1).double().norm(_DUALS[batch.threat.norm], dim=1)
        edge = torch.where(slope > 0, value.abs() / slope, torch.inf)  # the linearised boundary
        kept = torch.where(first, state.radius.minimum(_BEYOND * edge), state.radius * (1 + growth))
        radius = torch.where(fooled, length.minimum(state.radius) * (1 - change), kept)
        move = per_row((size * radius).to(state.x.dtype), state.x) * batch.threat.steepest(gradient, state.x)
        x = batch.threat.within(state.x + move, batch.x, radius.to(state.x.dtype))
        k = state.k + 1
        after = self._next_part(batch, replace(state, x=x, k=k, radius=radius, nearest=nearest, best=best))
        done = k >= self.steps
        return replace(after, x=torch.where(per_row(done, x), batch.project(after.x), after.x), done=done)

    def _plan(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) float64 share by which the radius changes, and step size in radii; both fall along a cosine."""
        quarter = self.steps // 4
        refining = k >= 2 * quarter
        since = torch.where(refining, k - 2 * quarter, k % max(quarter, 1))
        count = torch.where(refining, self.steps - 2 * quarter, max(quarter, 1))
        falling = (1 + torch.cos(math.pi * since.double() / count)) / 2
        change = torch.where(refining, _LAST * (_FINE / _LAST) ** falling, _FINE * (_COARSE / _FINE) ** falling)
        size = torch.where(refining, _SHORT + (_MIDDLE - _SHORT) * falling, _MIDDLE + (_LONG - _MIDDLE) * falling)
        return change, size

    def _next_part(self, batch: Batch, state: NearestState) -> NearestState:
        """The state with the second scout sent out, or with the nearest find to go on from, where that is due."""
        quarter = self.steps // 4
        away, back = state.k == quarter, (state.k == 2 * quarter) & (state.nearest < torch.inf)
        x, radius = state.x, state.radius
        if away.any():
            reach = self.far * _farthest(batch)
            short = reach.to(x.dtype)
            signs = noise.normal(batch.key, x.shape[1:], 1).sign()
            unit = batch.threat.length(signs.flatten(1))
            # Not along `steepest`: in L1 that is 1 % of the features, and clipped they end near the clean image.
            start = batch.threat.within(batch.x + per_row(short / unit, x) * signs, batch.x, short)
            x, radius = torch.where(per_row(away, x), start, x), torch.where(away, reach, radius)
        x = torch.where(per_row(back, x), state.best, x)
        return replace(state, x=x, radius=torch.where(back, state.nearest, radius))


def _farthest(batch: Batch) -> Tensor:
    """(n,) float64 distance of the farthest image inside the bounds."""
    low, high = batch.threat.bounds
    return batch.threat.length(torch.maximum(batch.x - low, high - batch.x).double().flatten(1))
