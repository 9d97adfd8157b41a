"""Auto-PGD for the L1 ball: sparse steps whose sparsity follows that of the best point, in balls that shrink."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.core.attack import Observation, State
from sparring.core.batch import Batch, per_row
from sparring.core.losses import named
from sparring.core.model import Access

RADII = (3.0, 2.0, 1.0)  # of eps, one a phase
SHARES = (0.3, 0.3, 0.4)  # of the steps


@dataclass(frozen=True)
class APGDL1State(State):
    """Where each row stands in its phase."""

    k: Tensor  # (n,) index of the point asked about
    size: Tensor  # (n,) float32: step size
    features: Tensor  # (n,) int64: how many of them a step moves
    sparsity: Tensor  # (n,) int64: features that the best point had changed when this was last looked at
    best: Tensor  # (n, c, h, w) the point of this phase with the largest loss
    best_gradient: Tensor  # (n, c, h, w) gradient there
    best_value: Tensor  # (n,) float64: loss there


@dataclass(frozen=True)
class APGDL1:
    """Steps along the sign of the largest gradient entries, projected onto the L1 ball and the box together.

    Croce and Hein 2021, algorithm 1: a step moves k features by eta / k each. Every 4 % of a phase k becomes the
    number of features that the best point has changed, over 1.5; where that number fell by 5 % the step is eps again
    and the search goes on from the best point, else the step shrinks by 1.5, down to eps / 10. The multi-eps scheme
    of the same paper: 30 % of the steps in the ball of 3 eps, 30 % in that of 2 eps, the rest in that of eps.
    """

    steps: int = 100
    loss: str = "cross_entropy"
    random_start: bool = True

    name: ClassVar[str] = "apgd_l1"
    version: ClassVar[int] = 1
    needs: ClassVar[Access] = Access.GRADIENT
    norms: ClassVar[tuple[str, ...]] = ("l1",)
    paper: ClassVar[str] = "Croce and Hein 2021, arXiv:2103.01208"
    minimizes: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> APGDL1State:
        """Start at a random legal point, or at the clean image."""
        x = batch.threat.sample(batch.x, batch.key) if self.random_start else batch.x
        zero, count = torch.zeros_like(batch.y), x[0].numel()
        return APGDL1State(
            x=x,
            done=torch.zeros_like(batch.targeted),
            k=zero,
            size=self._radius(zero, batch),
            features=zero + max(count // 5, 1),
            sparsity=zero + count,
            best=x,
            best_gradient=torch.zeros_like(x),
            best_value=torch.full_like(zero, -torch.inf, dtype=torch.float64),
        )

    def step(self, batch: Batch, state: APGDL1State, seen: Observation) -> APGDL1State:
        """Keep the best, adapt sparsity and step where that is due, move, and enter the next ball in time."""
        value, gradient = seen.value_and_grad(named(self.loss))
        begin, end = self._bounds(state.k)
        better = (state.k == begin) | (value.double() > state.best_value)
        rows = per_row(better, state.x)
        state = replace(
            state,
            best=torch.where(rows, state.x, state.best),
            best_gradient=torch.where(rows, gradient, state.best_gradient),
            best_value=torch.where(better, value.double(), state.best_value),
        )
        radius = self._radius(state.k, batch)
        state, x, gradient = self._adapt(batch, state, gradient, begin, end, radius)
        move = per_row(state.size, x) * _sparse(gradient, state.features)
        nearby = batch.threat.within(x + move, batch.x, radius)
        return self._enter(batch, replace(state, x=nearby), end)

    def _ends(self) -> tuple[int, int, int]:
        """The index after the last of each phase."""
        first, second = (int(share * self.steps) for share in SHARES[:2])
        return first, first + second, self.steps

    def _bounds(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) first index of the phase that `k` (n,) is in, and that of the next phase."""
        one, two, last = self._ends()
        begin = torch.where(k < one, 0, torch.where(k < two, one, two))
        return begin, torch.where(k < one, one, torch.where(k < two, two, last))

    def _radius(self, k: Tensor, batch: Batch) -> Tensor:
        """(n,) float32: the radius of the phase that `k` (n,) is in."""
        one, two, _ = self._ends()
        factor = torch.where(k < one, RADII[0], torch.where(k < two, RADII[1], RADII[2]))
        return (factor * batch.threat.eps).to(batch.x.dtype)

    def _adapt(
        self, batch: Batch, state: APGDL1State, gradient: Tensor, begin: Tensor, end: Tensor, radius: Tensor
    ) -> tuple[APGDL1State, Tensor, Tensor]:
        """The state, and the point and gradient to move on from."""
        since, every = state.k - begin, (0.04 * (end - begin)).long().clamp_min(1)
        due = (since > 0) & (since % every == 0)
        changed = (state.best != batch.x).flatten(1).sum(1)
        sparser = due & (changed < 0.95 * state.sparsity)
        shorter = torch.maximum(state.size / 1.5, radius / 10)
        after = replace(
            state,
            size=torch.where(sparser, radius, torch.where(due, shorter, state.size)),
            features=torch.where(due, (changed / 1.5).long().clamp_min(1), state.features),
            sparsity=torch.where(due, changed, state.sparsity),
        )
        rows = per_row(sparser, state.x)
        return after, torch.where(rows, state.best, state.x), torch.where(rows, state.best_gradient, gradient)

    def _enter(self, batch: Batch, state: APGDL1State, end: Tensor) -> APGDL1State:
        """Go on; at the end of a phase from the best point, projected onto the next ball."""
        k = state.k + 1
        over = (k == end) & (k < self.steps)
        radius = self._radius(k, batch)
        start = batch.threat.within(state.best, batch.x, radius)
        changed = (start != batch.x).flatten(1).sum(1)
        return replace(
            state,
            x=torch.where(per_row(over, start), start, state.x),
            k=k,
            done=k >= self.steps,
            size=torch.where(over, radius, state.size),
            features=torch.where(over, (changed / 1.5).long().clamp_min(1), state.features),
            sparsity=torch.where(over, changed, state.sparsity),
        )


def _sparse(gradient: Tensor, count: Tensor) -> Tensor:
    """The signs of the `count` (n,) largest entries of each row, over how many they are; equals of the last too."""
    flat = gradient.flatten(1)
    size = flat.abs()
    least = size.sort(1, descending=True).values.gather(1, count[:, None] - 1)
    sign = flat.sign() * (size >= least)
    return (sign / sign.abs().sum(1, keepdim=True).clamp_min(1)).view_as(gradient)
