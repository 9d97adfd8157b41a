"""Auto Conjugate Gradient: APGD's step sizes along conjugate directions, which leave one valley for the next."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.core.attack import Observation, State
from sparring.core.batch import Batch, per_row
from sparring.core.losses import named
from sparring.core.model import Access

_ROUNDING = 1e-5  # less than that share is what float32 gradients leave of zero


@dataclass(frozen=True)
class ACGState(State):
    """Where each row stands between its checkpoints; `x` is x^(k) of the paper."""

    k: Tensor  # (n,) index of the point asked about
    value: Tensor  # (n,) loss at x^(k-1)
    gradient: Tensor  # (n, c, h, w) gradient at x^(k-1)
    direction: Tensor  # (n, c, h, w) s^(k-1)
    size: Tensor  # (n,) step size
    best: Tensor  # (n, c, h, w) the point with the largest loss so far
    best_gradient: Tensor  # (n, c, h, w) gradient there
    best_value: Tensor  # (n,) loss there
    gradient_before: Tensor  # (n, c, h, w) gradient at the point from which the best one was reached
    direction_before: Tensor  # (n, c, h, w) and the direction that led to it
    rises: Tensor  # (n,) steps since the checkpoint that raised the loss
    since: Tensor  # (n,) steps since the checkpoint
    period: Tensor  # (n,) steps from that checkpoint to the next
    old_best: Tensor  # (n,) best loss at the checkpoint
    halved: Tensor  # (n,) bool: was the step halved there?


@dataclass(frozen=True)
class ACG:
    """s <- gradient + beta s, x <- project(x + step sign(s)): Yamamura et al. 2022, algorithm 1.

    beta is that of Hestenes and Stiefel, <-g, y> / <s, y> with y = g^(k-1) - g^(k), and 0 where that is negative, as
    in the authors' code, or <s, y> is zero but for rounding, as it is whenever the search swings back to where it
    was. The steps are APGD's (2 eps, halved at checkpoints by conditions 1 and 2 of Croce and Hein 2020); halving
    goes back to the best point, and to the gradient and the direction that led to it.
    """

    steps: int = 100
    loss: str = "margin"
    random_start: bool = True
    threshold: float = 0.75

    name: ClassVar[str] = "acg"
    version: ClassVar[int] = 1
    needs: ClassVar[Access] = Access.GRADIENT
    norms: ClassVar[tuple[str, ...]] = ("linf",)
    paper: ClassVar[str] = "Yamamura et al. 2022, arXiv:2206.09628"
    minimizes: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> ACGState:
        """Start at a random legal point, or at the clean image, with a step of twice eps."""
        x = batch.threat.sample(batch.x, batch.key) if self.random_start else batch.x
        zero, rest, false = torch.zeros_like(batch.y), torch.zeros_like(x), torch.zeros_like(batch.targeted)
        never = torch.full_like(zero, -torch.inf, dtype=torch.float64)
        return ACGState(
            x=x, done=false, k=zero, value=never, gradient=rest, direction=rest,
            size=torch.full_like(zero, 2 * batch.threat.eps, dtype=x.dtype),
            best=x, best_gradient=rest, best_value=never, gradient_before=rest, direction_before=rest,
            rises=zero, since=zero, period=torch.full_like(zero, max(int(0.22 * self.steps), 1)),
            old_best=never, halved=false,
        )  # fmt: skip

    def step(self, batch: Batch, state: ACGState, seen: Observation) -> ACGState:
        """Keep the best, halve the step at a checkpoint if need be, and move along a conjugate direction."""
        value, gradient = seen.value_and_grad(named(self.loss))
        state = self._remember(state, value.double(), gradient)
        state, x, gradient = self._checkpoint(state, gradient)
        direction = conjugate(gradient, state.gradient, state.direction)
        onward = batch.project(x + per_row(state.size, x) * batch.threat.steepest(direction))
        k = state.k + 1
        return replace(state, x=onward, gradient=gradient, direction=direction, k=k, done=k >= self.steps)

    def _remember(self, state: ACGState, value: Tensor, gradient: Tensor) -> ACGState:
        """The state with this observation in it; the first point is the first best, and nothing led to it."""
        first, better = state.k == 0, value > state.best_value
        rows = per_row(better, gradient)
        return replace(
            state,
            rises=state.rises + (~first & (value > state.value)),
            since=state.since + ~first,
            value=value,
            best=torch.where(rows, state.x, state.best),
            best_gradient=torch.where(rows, gradient, state.best_gradient),
            best_value=torch.where(better, value, state.best_value),
            gradient_before=torch.where(rows, state.gradient, state.gradient_before),
            direction_before=torch.where(rows, state.direction, state.direction_before),
            old_best=torch.where(first, value, state.old_best),
        )

    def _checkpoint(self, state: ACGState, gradient: Tensor) -> tuple[ACGState, Tensor, Tensor]:
        """The state, and the point and gradient to move on from: the best ones where the step was halved."""
        due = (state.since == state.period) & (state.k > 0)
        if not due.any():
            return state, state.x, gradient
        oscillates = state.rises <= self.threshold * state.period
        stands_still = ~state.halved & (state.old_best >= state.best_value)
        halve = due & (oscillates | stands_still)
        rows = per_row(halve, gradient)
        shorter = (state.period - max(int(0.03 * self.steps), 1)).clamp_min(max(int(0.06 * self.steps), 1))
        after = replace(
            state,
            size=torch.where(halve, state.size / 2, state.size),
            gradient=torch.where(rows, state.gradient_before, state.gradient),
            direction=torch.where(rows, state.direction_before, state.direction),
            halved=torch.where(due, halve, state.halved),
            old_best=torch.where(due, state.best_value, state.old_best),
            rises=state.rises.masked_fill(due, 0),
            since=state.since.masked_fill(due, 0),
            period=torch.where(due, shorter, state.period),
        )
        return after, torch.where(rows, state.best, state.x), torch.where(rows, state.best_gradient, gradient)


def conjugate(gradient: Tensor, before: Tensor, direction: Tensor) -> Tensor:
    """g + beta s for `gradient` g, the gradient `before`, and the last `direction` s, all (n, ...)."""
    g, s = gradient.flatten(1).double(), direction.flatten(1).double()
    y = before.flatten(1).double() - g
    along, least = (s * y).sum(1, keepdim=True), _ROUNDING * s.norm(dim=1, keepdim=True) * y.norm(dim=1, keepdim=True)
    beta = torch.where(along.abs() > least, -(g * y).sum(1, keepdim=True) / along, 0.0).clamp_min(0.0)
    conjugated = g + beta * s
    # On a line, as with two classes and linear logits, conjugacy leaves nothing; its rounding must not lead.
    left = conjugated.abs().amax(1, keepdim=True) > _ROUNDING * g.abs().amax(1, keepdim=True)
    return torch.where(left, conjugated, g).to(gradient.dtype).view_as(gradient)
