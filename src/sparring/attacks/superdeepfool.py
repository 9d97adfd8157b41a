"""SuperDeepFool: DeepFool, then back along the normal of the boundary that it has found."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.attacks.deepfool import is_fooled, nearest_boundary
from sparring.core.attack import Observation, State
from sparring.core.batch import Batch, per_row
from sparring.core.errors import UsageError
from sparring.core.model import Access

WALKING, PROJECTED, SEARCHING = 0, 1, 2
_LEAST = 0.01  # of the way gone so far: the end of a walk is projected, so to creep up to the boundary gains nothing


@dataclass(frozen=True)
class SuperDeepFoolState(State):
    """What a row does, and what it needs for that."""

    k: Tensor  # (n,) steps taken
    phase: Tensor  # (n,) WALKING, PROJECTED or SEARCHING
    walks: Tensor  # (n,) walks that have ended
    base: Tensor  # (n, c, h, w) where this walk began; while searching, the end that fools
    part: Tensor  # (n,) float64: `x` is so far along the way from the clean image to that end
    low: Tensor  # (n,) float64 the largest part that did not fool
    high: Tensor  # (n,) float64 the least that did
    below: Tensor  # (n,) float64 the margin at `low`
    above: Tensor  # (n,) float64 the margin at `high`
    looks: Tensor  # (n,) parts that it has been told to try


@dataclass(frozen=True)
class SuperDeepFool:
    """Walk with DeepFool until the model is fooled, project r onto the boundary's normal there; again if need be.

    Abdollahpoorrostam et al. 2023, SDF(inf, 1) for many classes: x = x_0 + (r . w / |w|^2) w with w the
    gradient of the margin where the walk ended; a walk that follows begins at x, as in the paper (the authors'
    code adds the projections up). No step of a walk is shorter than a hundredth of the way so far. Where the bounds
    are in the way x may never fool: after `walks` walks the end of the last one stands for it. Once x fools,
    `search` looks are spent on the way back to the clean image, by false position, each a tenth nearer to the end
    that fools. A step costs DeepFool's backward passes.
    """

    steps: int = 100
    overshoot: float = 0.02
    classes: int = 10
    walks: int = 3
    search: int = 4

    name: ClassVar[str] = "superdeepfool"
    version: ClassVar[int] = 2
    needs: ClassVar[Access] = Access.GRADIENT
    norms: ClassVar[tuple[str, ...]] = ("l2", "unbounded")
    paper: ClassVar[str] = "Abdollahpoorrostam et al. 2023, arXiv:2303.12481"
    minimizes: ClassVar[bool] = True
    needs_target: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse to try no class at all."""
        if self.classes < 2:
            raise UsageError(f"expected at least 2 classes to look at, the true one among them, got {self.classes}")

    def init(self, batch: Batch) -> SuperDeepFoolState:
        """Start at the clean image."""
        done, k = torch.zeros_like(batch.targeted), torch.zeros_like(batch.y)
        zero = torch.zeros_like(k, dtype=torch.float64)
        return SuperDeepFoolState(batch.x, done, k, k, k, batch.x, zero + 1, zero, zero + 1, zero, zero, k)

    def step(self, batch: Batch, state: SuperDeepFoolState, seen: Observation) -> SuperDeepFoolState:
        """Walk on, project, or search."""
        gone = batch.threat.distance(state.x, batch.x)
        onto, margin, normal = nearest_boundary(batch, seen, self.classes, _LEAST * gone)
        fooled = is_fooled(batch, seen)
        state = _noted(state, margin.double(), fooled, self.walks)
        walked = state.base + (1 + self.overshoot) * ((state.x - state.base) / (1 + self.overshoot) + onto)
        x = torch.where(per_row(fooled, walked), batch.x + _shadow(state.x - batch.x, normal), walked)
        share = (-state.below / (state.above - state.below).clamp_min(1e-30)).clamp(0.0, 1.0)
        part = state.low + (state.high - state.low) * (0.1 + 0.9 * share)
        searching, k = state.phase == SEARCHING, state.k + 1
        between = batch.x + per_row(part, x).to(x.dtype) * (state.base - batch.x)
        x = batch.threat.clip(torch.where(per_row(searching, x), between, x))
        done = (k >= self.steps) | (searching & (state.looks >= self.search))
        if done.any():
            x = torch.where(per_row(done, x), batch.project(x), x)
        phase = torch.where(searching, SEARCHING, torch.where(fooled, PROJECTED, WALKING))
        return replace(state, x=x, done=done, k=k, phase=phase, part=part)


def _noted(state: SuperDeepFoolState, margin: Tensor, fooled: Tensor, most: int) -> SuperDeepFoolState:
    """The state with what was seen at `x` in it; the search begins where a projection, or the last walk, fools."""
    projected = state.phase == PROJECTED
    walks = state.walks + (fooled & (state.phase == WALKING))
    begins = fooled & (projected | ((state.phase == WALKING) & (walks >= most)))
    searching = begins | (state.phase == SEARCHING)
    hit, miss = searching & fooled, (searching & ~fooled) | (state.k == 0)
    part = torch.where(state.phase == SEARCHING, state.part, (state.k > 0).double())
    return replace(
        state,
        phase=torch.where(searching, SEARCHING, state.phase),
        walks=walks,
        base=torch.where(per_row(projected | begins, state.x), state.x, state.base),
        low=torch.where(miss, part, state.low),
        high=torch.where(hit, part, state.high),
        below=torch.where(miss, margin, state.below),
        above=torch.where(hit, margin, state.above),
        looks=state.looks + searching,
    )


def _shadow(r: Tensor, normal: Tensor) -> Tensor:
    """(r . w / |w|^2) w for (n, ...) r and w."""
    flat, w = r.flatten(1).double(), normal.flatten(1).double()
    w = w / w.norm(dim=1, keepdim=True).clamp_min(1e-300)
    shadow: Tensor = (flat * w).sum(1, keepdim=True) * w
    return shadow.to(r.dtype).view_as(r)
