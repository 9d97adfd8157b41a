"""PDGD: descend on the image and climb on the multiplier at once; the nearest image in L2."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.core.attack import Observation, State
from sparring.core.batch import Batch, per_row
from sparring.core.losses import margin
from sparring.core.model import Access


@dataclass(frozen=True)
class PDGDState(State):
    """Where the two players stand."""

    k: Tensor  # (n,) steps taken
    first: Tensor  # (n, c, h, w) Adam's mean of the gradients
    second: Tensor  # (n, c, h, w) Adam's mean of their squares
    dual: Tensor  # (n,) log(lambda_1 / lambda_0)
    weight: Tensor  # (n,) the running mean of lambda_1, which is 1 - lambda_0


@dataclass(frozen=True)
class PDGD:
    """Descend lambda_0 ||d||_2 + lambda_1 softplus(max(-margin, 0)) on d, and climb on the lambdas, which sum to 1.

    Matyasko and Chau 2021, primal-dual gradient descent. Adam takes the steps on d, which fall from `step_size` to a
    hundredth of it; log(lambda_1 / lambda_0) goes up by `dual_step` where the point does not fool and down where it
    does, and its softmax is averaged over steps. `step_size` is in units of the input, and suits a range of 1.
    """

    steps: int = 500
    step_size: float = 0.3
    dual_step: float = 0.1
    ratio: float = 1.0

    name: ClassVar[str] = "pdgd"
    version: ClassVar[int] = 1
    needs: ClassVar[Access] = Access.GRADIENT
    norms: ClassVar[tuple[str, ...]] = ("l2", "unbounded")
    paper: ClassVar[str] = "Matyasko and Chau 2021, arXiv:2106.01538"
    minimizes: ClassVar[bool] = True
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> PDGDState:
        """Start at the clean image, with lambda_0 / lambda_1 = `ratio`."""
        return begun(batch, self.ratio)

    def step(self, batch: Batch, state: PDGDState, seen: Observation) -> PDGDState:
        """Both players move."""
        value, climb = seen.value_and_grad(margin)
        delta = state.x - batch.x
        pull = delta / per_row(delta.flatten(1).norm(dim=1).clamp_min(1e-12), delta)
        push = torch.where(value <= 0, torch.sigmoid(-value), 0.0)
        slope = per_row(1 - state.weight, delta) * pull - per_row(state.weight * push, delta) * climb
        k = state.k + 1
        first = 0.9 * state.first + 0.1 * slope
        second = 0.999 * state.second + 0.001 * slope.square()
        mean, spread = first / per_row(1 - 0.9**k, slope), second / per_row(1 - 0.999**k, slope)
        size = self.step_size * 0.01 ** (state.k / self.steps)
        x = batch.threat.clip(state.x - per_row(size, mean) * mean / (spread.sqrt() + 1e-8))
        moved = replace(state, x=x, first=first, second=second)
        return answered(batch, state, moved, seen.adversarial, value, self.steps, self.dual_step)


def begun(batch: Batch, ratio: float) -> PDGDState:
    """The state at the clean image, with lambda_0 / lambda_1 = `ratio`."""
    k, nothing = torch.zeros_like(batch.y), torch.zeros_like(batch.x)
    dual = torch.full_like(k, -math.log(ratio), dtype=torch.float32)
    return PDGDState(batch.x, torch.zeros_like(batch.targeted), k, nothing, nothing, dual, dual.sigmoid())


def answered(
    batch: Batch, state: PDGDState, moved: PDGDState, fooled: Tensor, value: Tensor, steps: int, dual_step: float
) -> PDGDState:
    """`moved` after the multiplier's answer to `state`, where the point `fooled` (n,) or not, with margin `value`."""
    # Beyond eps the judge says no, yet it is the distance that is to shrink there.
    far = (value > 0) & (batch.threat.distance(state.x, batch.x) > batch.threat.eps)
    size = dual_step * (1.0 - 0.9 * state.k / max(steps - 1, 1))
    dual = (state.dual + torch.where(fooled | far, -size, size)).clamp(-math.log(1e6), math.log(1e6))
    weight, k = 0.9 * state.weight + 0.1 * dual.sigmoid(), state.k + 1
    x, done = moved.x, k >= steps
    if done.any():
        x = torch.where(per_row(done, x), batch.project(x), x)
    return replace(moved, x=x, done=done, k=k, dual=dual, weight=weight)
