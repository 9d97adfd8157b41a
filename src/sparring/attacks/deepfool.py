"""DeepFool: one step after another onto the nearest of the linearised boundaries."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.core.attack import Observation, State
from sparring.core.batch import Batch, per_row
from sparring.core.errors import UsageError
from sparring.core.model import Access

_LAST = 0.1  # of the overshoot is left at the last look
_LEAST = 1e-4  # of the range: steps shorter than that would creep up to a boundary where pixels are at a bound


@dataclass(frozen=True)
class DeepFoolState(State):
    """Where the walk stands."""

    k: Tensor  # (n,) steps taken


@dataclass(frozen=True)
class DeepFool:
    """Step onto the nearest linearised boundary, until the model is fooled; look `overshoot` beyond it.

    Moosavi-Dezfooli et al. 2016, algorithm 2, and section 3.3 for Linf. As in the authors' code the model is asked
    about x_0 + (1 + overshoot) r, and of `classes` only the likeliest are tried, the true one among them: each
    step costs `classes` - 1 backward passes. A row with a target steps towards the boundary between that and the
    leading class, at one backward pass. Where the model is fooled the last look has a tenth of the overshoot.
    """

    steps: int = 50
    overshoot: float = 0.02
    classes: int = 10

    name: ClassVar[str] = "deepfool"
    version: ClassVar[int] = 2
    needs: ClassVar[Access] = Access.GRADIENT
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "unbounded")
    paper: ClassVar[str] = "Moosavi-Dezfooli et al. 2016, arXiv:1511.04599"
    minimizes: ClassVar[bool] = True
    needs_target: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse to try no class at all."""
        if self.classes < 2:
            raise UsageError(f"expected at least 2 classes to look at, the true one among them, got {self.classes}")

    def init(self, batch: Batch) -> DeepFoolState:
        """Start at the clean image."""
        return DeepFoolState(batch.x, torch.zeros_like(batch.targeted), torch.zeros_like(batch.y))

    def step(self, batch: Batch, state: DeepFoolState, seen: Observation) -> DeepFoolState:
        """Go on to the nearest boundary, or have the last look."""
        onto, _, _ = nearest_boundary(batch, seen, self.classes)
        taken = (state.x - batch.x) / (1 + self.overshoot)
        onward = batch.x + (1 + self.overshoot) * (taken + onto)
        back = batch.x + (1 + _LAST * self.overshoot) * taken
        fooled, k = is_fooled(batch, seen), state.k + 1
        x = batch.threat.clip(torch.where(per_row(fooled, onward), back, onward))
        done = fooled | (k >= self.steps)
        if done.any():
            x = torch.where(per_row(done, x), batch.project(x), x)
        return replace(state, x=x, k=k, done=done)


def is_fooled(batch: Batch, seen: Observation) -> Tensor:
    """(n,) bool: does the model answer as it should not, wherever the point lies? The walk ends there."""
    return (seen.labels == batch.label) == batch.targeted


def nearest_boundary(
    batch: Batch, seen: Observation, classes: int, least: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The shortest step (n, ...) onto one of the linearised boundaries; the margin (n,) and its gradient.

    The boundaries are those between the true class and its rivals, or between the target and its first rival. No
    step is shorter than 1e-4 of the range, which the authors' code adds to each, nor than `least` (n,) if given.
    """
    label = batch.label[:, None]
    logits = seen.logits
    most = min(classes, logits.shape[1]) - 1
    rivals = logits.scatter(1, label, -torch.inf).topk(most, dim=1).indices
    rivals = torch.where(batch.targeted[:, None], rivals[:, :1], rivals)
    count = 1 if bool(batch.targeted.all()) else most
    found: list[Tensor] = []
    for rank in range(count):

        def gap(z: Tensor, rows: Batch, rival: Tensor = rivals[:, rank : rank + 1]) -> Tensor:
            return rows.sign * (z.gather(1, label) - z.gather(1, rival)).squeeze(1)

        value, gradient = seen.value_and_grad(gap, keep=rank + 1 < count)
        value = value.nan_to_num(0.0)
        slope = gradient.flatten(1).double().norm(1 if batch.threat.norm == "linf" else 2, dim=1)
        far = torch.where(slope > 0, value.double().abs() / slope, torch.inf)
        if not found:
            found = [far, gradient, value, gradient]
        closer = far < found[0]
        found[:2] = [torch.where(closer, far, found[0]), torch.where(per_row(closer, gradient), gradient, found[1])]
    distance, direction, margin, towards = found
    distance = distance if least is None else distance.maximum(least)
    # Not so short that a tie is never left, not so long that a step without a direction becomes NaN.
    low, high = batch.threat.bounds
    length = distance.clamp(_LEAST * (high - low), 1e9).to(direction.dtype)
    return per_row(length, direction) * batch.threat.steepest(direction), margin, towards
