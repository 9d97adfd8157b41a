"""MI-FGSM: iterative steps along gradients that add up, so that what one point alone suggests averages out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.core.attack import Observation, State
from sparring.core.batch import Batch
from sparring.core.losses import named
from sparring.core.model import Access


@dataclass(frozen=True)
class MIFGSMState(State):
    """MI-FGSM's place, and where it is headed."""

    k: Tensor  # (n,) steps taken
    velocity: Tensor  # (n, c, h, w) the normalised gradients so far, older ones fading


@dataclass(frozen=True)
class MIFGSM:
    """g <- momentum g + gradient / ||gradient||_1; x <- project(x + step * steepest(g)).

    Dong et al. 2018, algorithm 1. `step_size` is in the units of the input; left out, it is eps / steps, as in the
    paper. In L2 the step is g over its length.
    """

    steps: int = 10
    step_size: float | None = None
    momentum: float = 1.0
    loss: str = "cross_entropy"

    name: ClassVar[str] = "mifgsm"
    version: ClassVar[int] = 1
    needs: ClassVar[Access] = Access.GRADIENT
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    paper: ClassVar[str] = "Dong et al. 2018, arXiv:1710.06081"
    minimizes: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> MIFGSMState:
        """Start at the clean image, at rest."""
        rest = torch.zeros_like(batch.x)
        return MIFGSMState(batch.x, torch.zeros_like(batch.targeted), torch.zeros_like(batch.y), rest)

    def step(self, batch: Batch, state: MIFGSMState, seen: Observation) -> MIFGSMState:
        """Add the gradient, and move."""
        _, gradient = seen.value_and_grad(named(self.loss))
        size = batch.threat.eps / self.steps if self.step_size is None else self.step_size
        velocity = self.momentum * state.velocity + normalised(gradient)
        x = batch.project(state.x + size * batch.threat.steepest(velocity))
        k = state.k + 1
        return replace(state, x=x, k=k, velocity=velocity, done=k >= self.steps)


def normalised(gradient: Tensor) -> Tensor:
    """`gradient` (n, ...) over the mean size of its entries; zero where that is zero.

    The mean is the L1 norm over the number of pixels: a constant that no sign can tell, but that gives entries
    around 1, so that a look ahead along them (NI-FGSM) is as long as a step, as in the authors' own code.
    """
    flat = gradient.flatten(1)
    flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(1e-38)  # or tiny gradients lose their direction
    return (flat / flat.abs().mean(1, keepdim=True).clamp_min(1e-12)).view_as(gradient)
