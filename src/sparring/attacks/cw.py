"""Carlini and Wagner's L2 attack: Adam on the distance and the margin together, without bounds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.core.attack import Observation, State
from sparring.core.batch import Batch, per_row
from sparring.core.losses import named
from sparring.core.model import Access

_INSIDE = 0.99  # of the range: where a pixel at a bound begins; nearer to it the slope of tanh is all but zero
_BETAS = (0.9, 0.999)
_ENOUGH = 0.9999  # a cost that has not fallen below this part of the last one checked has come to rest
_PATIENCE = 10  # steps between two such checks at least: Adam's first ones may raise the cost
_MOST = 1e10  # the largest c, as in the authors' code
_STRIDE, _LONGEST = 3.0, 0.2  # what a step size is multiplied by after a round that fools nobody, and up to where


@dataclass(frozen=True)
class CWState(State):
    """Adam's place within a round, and the search for c over the rounds."""

    k: Tensor  # (n,) steps taken in this round
    round: Tensor  # (n,) rounds finished
    w: Tensor  # (n, c, h, w) the point, as tanh sees it
    first: Tensor  # (n, c, h, w) Adam's running mean of the gradient
    second: Tensor  # (n, c, h, w) and of its square
    size: Tensor  # (n,) float64 of the steps in this round
    c: Tensor  # (n,) float64 what the margin weighs in this round
    low: Tensor  # (n,) float64 the largest c that was too small
    high: Tensor  # (n,) float64 the smallest c that was enough
    fooled: Tensor  # (n,) bool: was it enough in this round?
    cost: Tensor  # (n,) float64 the cost at the last check


@dataclass(frozen=True)
class CW:
    """Minimise |x' - x|^2 + c max(-margin, -kappa) over w with x' = (tanh(w) + 1) / 2; search c for the least.

    Carlini and Wagner 2017, section V with f_6 and section VI.A. Adam takes `steps` steps of `step_size` for each
    of `rounds` values of c: from `c` on ten times as much until one is enough, then halfway. As long as none is, the
    steps grow threefold too, up to 0.2: few steps of 0.01 do not bring a pixel away from a bound. The authors begin
    1e-6 from the bounds, not 0.01, and at c = 1e-3, which seldom fools. `kappa` is the margin to reach. The distance
    is in units of the pixel range, so c means the same whatever the bounds. With `abort_early`, as in the authors'
    code, a row goes on to its next round when a tenth of the steps, or ten, has not lowered its cost by 0.01 %; here
    each row for itself.
    """

    steps: int = 1000
    rounds: int = 9
    step_size: float = 0.01
    c: float = 0.01
    kappa: float = 0.0
    abort_early: bool = True

    name: ClassVar[str] = "cw"
    version: ClassVar[int] = 2
    needs: ClassVar[Access] = Access.GRADIENT
    norms: ClassVar[tuple[str, ...]] = ("l2", "unbounded")
    paper: ClassVar[str] = "Carlini and Wagner 2017, arXiv:1608.04644"
    minimizes: ClassVar[bool] = True
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> CWState:
        """Start at the clean image, or as near to it as tanh comes."""
        w, zero = _to_w(batch), torch.zeros_like(batch.y)
        weight, no = torch.full_like(zero, self.c, dtype=torch.float64), torch.zeros_like(batch.targeted)
        still, never = torch.zeros_like(w), torch.full_like(weight, torch.inf)
        size, least = torch.full_like(weight, self.step_size), torch.zeros_like(weight)
        return CWState(_to_x(batch, w), no, zero, zero, w, still, still, size, weight, least, never, no, never)

    def step(self, batch: Batch, state: CWState, seen: Observation) -> CWState:
        """One step of Adam; at the end of a round the next begins with another c."""
        margin, slope = seen.value_and_grad(named("margin"))
        low, high = batch.threat.bounds
        change = (state.x - batch.x) / (high - low)
        cost = change.double().flatten(1).square().sum(1) - state.c * margin.double().clamp_max(self.kappa)
        pull = per_row(torch.where(margin < self.kappa, state.c, 0.0).to(slope.dtype), slope)
        uphill = (2 * change / (high - low) - pull * slope) * (high - low) / 2 * (1 - _tanh(state.w).square())
        k = state.k + 1
        first = _BETAS[0] * state.first + (1 - _BETAS[0]) * uphill
        second = _BETAS[1] * state.second + (1 - _BETAS[1]) * uphill.square()
        mean, square = (
            moment / per_row(1 - beta ** k.double(), moment).to(moment.dtype)
            for beta, moment in zip(_BETAS, (first, second), strict=True)
        )
        w = state.w - per_row(state.size.to(mean.dtype), mean) * mean / (square.sqrt() + 1e-8)
        check = (
            (state.k % max(self.steps // 10, _PATIENCE) == 0) if self.abort_early else torch.zeros_like(state.fooled)
        )
        resting = check & (cost > _ENOUGH * state.cost)
        after = replace(
            state, k=k, w=w, first=first, second=second,
            fooled=state.fooled | (margin > self.kappa), cost=torch.where(check, cost, state.cost),
        )  # fmt: skip
        return self._turn(batch, after, resting | (k >= self.steps))

    def _turn(self, batch: Batch, state: CWState, over: Tensor) -> CWState:
        """The state with the next point in it; where a round is `over`, the first of the next round."""
        high = torch.where(state.fooled, state.c.minimum(state.high), state.high)
        low = torch.where(state.fooled, state.low, state.c.maximum(state.low))
        c = torch.where(high < torch.inf, (low + high) / 2, 10 * state.c).clamp_max(_MOST)
        done = state.done | (over & (state.round + 1 >= self.rounds))
        longer = (_STRIDE * state.size).clamp_max(max(_LONGEST, self.step_size))
        x = _to_x(batch, state.w)
        if done.any():
            x = torch.where(per_row(done, x), batch.project(x), x)
        if not over.any():
            return replace(state, x=x, done=done)
        fresh = self.init(batch)
        rows = per_row(over & ~done, x)
        return replace(
            state,
            x=torch.where(rows, fresh.x, x),
            done=done,
            k=torch.where(over, fresh.k, state.k),
            round=state.round + over,
            w=torch.where(rows, fresh.w, state.w),
            first=torch.where(rows, fresh.first, state.first),
            second=torch.where(rows, fresh.second, state.second),
            size=torch.where(over & high.isinf(), longer, state.size),
            c=torch.where(over, c, state.c),
            low=torch.where(over, low, state.low),
            high=torch.where(over, high, state.high),
            fooled=state.fooled & ~over,
            cost=torch.where(over, fresh.cost, state.cost),
        )


def _to_w(batch: Batch) -> Tensor:
    """What tanh makes the clean images of, or nearly."""
    low, high = batch.threat.bounds
    return ((batch.x - low) / (high - low) * 2 - 1).double().clamp(-_INSIDE, _INSIDE).atanh().to(batch.x.dtype)


def _to_x(batch: Batch, w: Tensor) -> Tensor:
    """The images behind `w`."""
    low, high = batch.threat.bounds
    return batch.threat.clip(low + (high - low) * (_tanh(w) + 1) / 2)


def _tanh(w: Tensor) -> Tensor:
    """In float64: in float32 its last bit may depend on the place in the batch."""
    return w.double().tanh().to(w.dtype)
