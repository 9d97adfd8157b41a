"""Auto-PGD: momentum, and a step size that halves itself when progress stops."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.core.attack import Observation, State
from sparring.core.batch import Batch, per_row
from sparring.core.losses import named
from sparring.core.model import Access


@dataclass(frozen=True)
class APGDState(State):
    """Where each row stands between its checkpoints; `x` is x^(k) of the paper."""

    k: Tensor  # (n,) index of the point asked about
    previous: Tensor  # (n, c, h, w) x^(k-1)
    value: Tensor  # (n,) loss at x^(k-1)
    size: Tensor  # (n,) step size
    best: Tensor  # (n, c, h, w) the point with the largest loss so far
    best_gradient: Tensor  # (n, c, h, w) gradient there
    best_value: Tensor  # (n,) loss there
    rises: Tensor  # (n,) steps since the checkpoint that raised the loss
    since: Tensor  # (n,) steps since the checkpoint
    period: Tensor  # (n,) steps from that checkpoint to the next
    old_best: Tensor  # (n,) best loss at the checkpoint
    halved: Tensor  # (n,) bool: was the step halved there?


@dataclass(frozen=True)
class APGD:
    """PGD with momentum 0.75 whose step halves at a checkpoint if the loss oscillates or its best stands still.

    Croce and Hein 2020, algorithm 1: eta_0 = 2 eps; checkpoints at 22 % of the steps, then ever closer, by
    3 % a time down to 6 %; conditions 1 (fewer than 75 % of the steps raised the loss) and 2.
    """

    steps: int = 100
    loss: str = "cross_entropy"
    random_start: bool = True
    momentum: float = 0.75
    threshold: float = 0.75

    name: ClassVar[str] = "apgd"
    version: ClassVar[int] = 1
    needs: ClassVar[Access] = Access.GRADIENT
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    paper: ClassVar[str] = "Croce and Hein 2020, arXiv:2003.01690"
    minimizes: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> APGDState:
        """Start at a random legal point, or at the clean image, with a step of twice eps."""
        x = batch.threat.sample(batch.x, batch.key) if self.random_start else batch.x
        zero = torch.zeros_like(batch.y)
        never = torch.full_like(zero, -torch.inf, dtype=torch.float64)
        return APGDState(
            x=x,
            done=torch.zeros_like(batch.targeted),
            k=zero,
            previous=x,
            value=never,
            size=torch.full_like(zero, 2 * batch.threat.eps, dtype=batch.x.dtype),
            best=x,
            best_gradient=torch.zeros_like(x),
            best_value=never,
            rises=zero,
            since=zero,
            period=torch.full_like(zero, max(int(0.22 * self.steps), 1)),
            old_best=never,
            halved=torch.zeros_like(batch.targeted),
        )

    def step(self, batch: Batch, state: APGDState, seen: Observation) -> APGDState:
        """Keep the best, halve the step at a checkpoint if need be, and move on."""
        value, gradient = seen.value_and_grad(named(self.loss))
        state = self._remember(state, value.double(), gradient)
        state, x, gradient = self._checkpoint(state, gradient)
        nearby = self._move(batch, x, gradient, state)
        k = state.k + 1
        return replace(state, x=nearby, previous=x, k=k, done=k >= self.steps)

    def _remember(self, state: APGDState, value: Tensor, gradient: Tensor) -> APGDState:
        """The state with this observation in it; the first point is the first best."""
        first, better = state.k == 0, value > state.best_value
        old_best = torch.where(first, value, state.old_best)
        return replace(
            state,
            rises=state.rises + (~first & (value > state.value)),
            since=state.since + ~first,
            value=value,
            best=torch.where(per_row(better, state.x), state.x, state.best),
            best_gradient=torch.where(per_row(better, state.x), gradient, state.best_gradient),
            best_value=torch.where(better, value, state.best_value),
            old_best=old_best,
        )

    def _checkpoint(self, state: APGDState, gradient: Tensor) -> tuple[APGDState, Tensor, Tensor]:
        """The state, and the point and gradient to move on from: the best ones where the step was halved."""
        due = (state.since == state.period) & (state.k > 0)
        if not due.any():
            return state, state.x, gradient
        oscillates = state.rises <= self.threshold * state.period
        stands_still = ~state.halved & (state.old_best >= state.best_value)
        halve = due & (oscillates | stands_still)
        zero = torch.zeros_like(state.since)
        shorter = (state.period - max(int(0.03 * self.steps), 1)).clamp_min(max(int(0.06 * self.steps), 1))
        after = replace(
            state,
            size=torch.where(halve, state.size / 2, state.size),
            halved=torch.where(due, halve, state.halved),
            old_best=torch.where(due, state.best_value, state.old_best),
            rises=torch.where(due, zero, state.rises),
            since=torch.where(due, zero, state.since),
            period=torch.where(due, shorter, state.period),
        )
        rows = per_row(halve, state.x)
        return after, torch.where(rows, state.best, state.x), torch.where(rows, state.best_gradient, gradient)

    def _move(self, batch: Batch, x: Tensor, gradient: Tensor, state: APGDState) -> Tensor:
        """A projected step, mixed with the last move (algorithm 1); the first step has no last move."""
        ahead = batch.project(x + per_row(state.size, x) * batch.threat.steepest(gradient))
        share = per_row(torch.where(state.k > 0, self.momentum, 1.0), x)
        return batch.project(x + share * (ahead - x) + (1 - share) * (x - state.previous))
