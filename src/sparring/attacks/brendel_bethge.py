"""Brendel and Bethge's attack: along the decision boundary, from a point that fools to the nearest one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.attacks.boundary_step import boundary_step
from sparring.attacks.hopskipjump import between, ending, fools, guess
from sparring.core.attack import Observation, State
from sparring.core.batch import Batch, per_row
from sparring.core.losses import margin
from sparring.core.model import Access

_SEEK, _HALVE, _WALK = range(3)
_WIDER = {"linf": 10.0}  # times the radius: a step in Linf moves every pixel, and is long in L2


@dataclass(frozen=True)
class BrendelBethgeState(State):
    """Each row's place in the algorithm; `x` may lie outside the ball, but the last point does not."""

    k: Tensor  # (n,) queries answered
    phase: Tensor  # (n,) what the next answer is for
    begun: Tensor  # (n,) of which before this phase
    far: Tensor  # (n, c, h, w) a point that fools
    low: Tensor  # (n,) float64 share of the way to `far` that does not fool
    high: Tensor  # (n,) float64 one that does
    reach: Tensor  # (n,) float64 L2 distance from the image at which the walk began
    normal: Tensor  # (n, c, h, w) running mean of the margin's gradients on the walk


@dataclass(frozen=True)
class BrendelBethge:
    """Step after step to the point of the linearised boundary that is nearest to the image, in trust region and box.

    Brendel et al. 2019, equation 1, solved exactly by `boundary_step`, with the `momentum` and the `overshoot` of the
    authors' code. As there the trust region halves at even intervals, here `cuts` times (theirs 20); it begins with
    `radius` times the L2 distance at which the walk does, in Linf with ten times that. Walks that begin far off often
    end there: so the start is sought by climbing the margin from the image, and only if `climbs` steps do not get to
    one, which says that gradients mislead, among random images; the way to it is halved `halvings` times.
    """

    steps: int = 100
    radius: float = 0.3
    cuts: int = 10
    overshoot: float = 0.1
    momentum: float = 0.8
    climbs: int = 12
    pace: float = 0.05
    halvings: int = 6

    name: ClassVar[str] = "brendel_bethge"
    version: ClassVar[int] = 1
    needs: ClassVar[Access] = Access.GRADIENT
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1", "unbounded")
    paper: ClassVar[str] = "Brendel et al. 2019, arXiv:1907.01003"
    minimizes: ClassVar[bool] = True
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> BrendelBethgeState:
        """Ask about the image, or about the point that is given to begin at."""
        zero, share = torch.zeros_like(batch.y), torch.zeros_like(batch.y, dtype=torch.float64)
        x, seeking = batch.begin, torch.full_like(zero, _SEEK)
        return BrendelBethgeState(
            x, torch.zeros_like(batch.targeted), zero, seeking, zero, x, share, share + 1, share, torch.zeros_like(x)
        )

    def step(self, batch: Batch, state: BrendelBethgeState, seen: Observation) -> BrendelBethgeState:
        """Each row goes on with what it is at."""
        fooled, k = fools(batch, seen), state.k + 1
        value, gradient = seen.value_and_grad(margin)
        seek, halve, walk = (state.phase == each for each in (_SEEK, _HALVE, _WALK))
        hit, middle = seek & fooled, (state.low + state.high) / 2
        low, high = torch.where(halve & ~fooled, middle, state.low), torch.where(halve & fooled, middle, state.high)
        far = torch.where(per_row(hit, state.far), state.x, state.far)
        found = halve & (k - state.begun >= self.halvings)
        begun = torch.where(hit | found, k, state.begun)
        phase = torch.where(hit, _HALVE, torch.where(found, _WALK, state.phase))
        x = torch.where(per_row(seek, far), self._seek(batch, state, gradient), state.x)
        share = torch.where(found, high, (low + high) / 2)
        x = torch.where(per_row(hit | halve, x), between(batch, far, share), x)
        reach = torch.where(found, (x - batch.x).flatten(1).double().norm(dim=1), state.reach)
        mixed = self.momentum * state.normal + (1 - self.momentum) * gradient
        normal = torch.where(per_row(state.begun == state.k, mixed), gradient, mixed)
        after = replace(state, k=k, phase=phase, begun=begun, far=far, low=low, high=high, reach=reach, normal=normal)
        if walk.any():
            x = torch.where(per_row(walk, x), self._walk(batch, state, value.nan_to_num(0.0), normal), x)
        return ending(batch, replace(after, x=x), k >= self.steps)

    def _seek(self, batch: Batch, state: BrendelBethgeState, gradient: Tensor) -> Tensor:
        """Up the margin by `pace` of the range on the mean pixel; where that has led nowhere, a random image."""
        low, high = batch.threat.bounds
        stuck = ((gradient > 0) & (state.x >= high)) | ((gradient < 0) & (state.x <= low))
        way = gradient.masked_fill(stuck, 0.0).flatten(1).double()
        size = self.pace * (high - low) * way.shape[1] ** 0.5
        way = size * _unit(way)[0]
        up = batch.threat.clip(state.x + way.to(state.x.dtype).view_as(state.x))
        return torch.where(per_row(state.k < self.climbs, up), up, guess(batch, state.k))

    def _walk(self, batch: Batch, state: BrendelBethgeState, value: Tensor, normal: Tensor) -> Tensor:
        """To the boundary: a little short of it where the point fools, a little beyond where it does not."""
        slope, length = _unit(normal.flatten(1).double())
        aim = torch.where(value > 0, 1 - self.overshoot, 1 + self.overshoot) * value.double()
        norm = "l2" if batch.threat.norm == "unbounded" else batch.threat.norm
        walked = (state.k - state.begun).double() / (self.steps - state.begun)
        radius = self.radius * _WIDER.get(norm, 1.0) * state.reach * 0.5 ** (self.cuts * walked).floor()
        x, origin = state.x.flatten(1).double(), batch.x.flatten(1).double()
        rise = -aim[:, None] / length
        step = boundary_step(norm, x, origin, slope, rise, radius[:, None], batch.threat.bounds)
        return batch.threat.clip((x + step).to(state.x.dtype).view_as(state.x))


def _unit(way: Tensor) -> tuple[Tensor, Tensor]:
    """`way` (n, d) over its L2 norm, and that norm (n, 1); zero stays zero."""
    length = way.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return way / length, length
