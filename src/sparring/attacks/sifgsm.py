"""SI-NI-FGSM: the gradient is the mean over darker and darker copies of the image, on which models agree more."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.attacks.mifgsm import normalised
from sparring.core.attack import Observation, State
from sparring.core.batch import Batch, per_row
from sparring.core.errors import UsageError
from sparring.core.losses import named
from sparring.core.model import Access


@dataclass(frozen=True)
class SIFGSMState(State):
    """SI-NI-FGSM's place; `x` is a copy of the point ahead of it, but the last one is the place itself."""

    k: Tensor  # (n,) steps taken
    copy: Tensor  # (n,) i of the copy x / 2^i that is asked about
    place: Tensor  # (n, c, h, w) x_t of the paper
    ahead: Tensor  # (n, c, h, w) x_t^nes, of which the copies are made
    velocity: Tensor  # (n, c, h, w) the normalised gradients so far, older ones fading
    total: Tensor  # (n, c, h, w) the gradients of this step's copies so far


@dataclass(frozen=True)
class SIFGSM:
    """NI-FGSM with the mean gradient over the copies x / 2^i, i < `copies`: Lin et al. 2020, algorithm 1.

    A step takes as many queries as there are copies. Without `nesterov` it is SI-MI-FGSM, which makes its copies
    of the place itself. Where 0 is no pixel value, copies shrink towards the one nearest to it.
    """

    steps: int = 10
    step_size: float | None = None
    momentum: float = 1.0
    copies: int = 5
    nesterov: bool = True
    loss: str = "cross_entropy"

    name: ClassVar[str] = "sifgsm"
    version: ClassVar[int] = 1
    needs: ClassVar[Access] = Access.GRADIENT
    norms: ClassVar[tuple[str, ...]] = ("linf",)
    paper: ClassVar[str] = "Lin et al. 2020, arXiv:1908.06281"
    minimizes: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse a mean over nothing."""
        if self.copies < 1:
            raise UsageError(f"expected at least 1 copy, got {self.copies}")

    def init(self, batch: Batch) -> SIFGSMState:
        """Start at the clean image, at rest, with the brightest copy: the image itself."""
        x, rest, zero = batch.x, torch.zeros_like(batch.x), torch.zeros_like(batch.y)
        return SIFGSMState(x, torch.zeros_like(batch.targeted), zero, zero, x, x, rest, rest)

    def step(self, batch: Batch, state: SIFGSMState, seen: Observation) -> SIFGSMState:
        """Add a copy's gradient; after the last copy, move and look ahead."""
        _, gradient = seen.value_and_grad(named(self.loss))
        size = batch.threat.eps / self.steps if self.step_size is None else self.step_size
        total = state.total + per_row(_share(state.copy), gradient) * gradient  # by the chain rule
        complete = state.copy + 1 >= self.copies
        rows = per_row(complete, state.x)
        velocity = torch.where(rows, self.momentum * state.velocity + normalised(total), state.velocity)
        onward = batch.project(state.place + size * batch.threat.steepest(velocity))
        place = torch.where(rows, onward, state.place)
        reach = size * self.momentum if self.nesterov else 0.0
        ahead = torch.where(rows, batch.threat.clip(place + reach * velocity), state.ahead)
        k, copy = state.k + complete, torch.where(complete, 0, state.copy + 1)
        done = k >= self.steps
        dark = batch.threat.clip(torch.zeros_like(ahead))
        x = torch.where(per_row(done, place), place, dark + per_row(_share(copy), ahead) * (ahead - dark))
        total = torch.where(rows, 0.0, total)
        return replace(
            state, x=x, done=done, k=k, copy=copy, place=place, ahead=ahead, velocity=velocity, total=total
        )


def _share(copy: Tensor) -> Tensor:
    """(n,) float32 2^-i."""
    return torch.exp2(-copy.float())
