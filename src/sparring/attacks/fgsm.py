"""Fast Gradient Sign Method: one step of full length."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from sparring.core.attack import Observation, State
from sparring.core.batch import Batch
from sparring.core.losses import named
from sparring.core.model import Access


@dataclass(frozen=True)
class FGSM:
    """x + eps sign(gradient): Goodfellow, Shlens, Szegedy 2015, section 4; in L2 the gradient over its length."""

    loss: str = "cross_entropy"

    name: ClassVar[str] = "fgsm"
    version: ClassVar[int] = 1
    needs: ClassVar[Access] = Access.GRADIENT
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    paper: ClassVar[str] = "Goodfellow et al. 2015, arXiv:1412.6572"
    minimizes: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> State:
        """Ask for the gradient at the clean image."""
        return State(batch.x, torch.zeros_like(batch.targeted))

    def step(self, batch: Batch, state: State, seen: Observation) -> State:
        """Step once, as far as the threat model allows."""
        _, gradient = seen.value_and_grad(named(self.loss))
        x = batch.x + batch.threat.eps * batch.threat.steepest(gradient, batch.x)
        return replace(state, x=batch.project(x), done=torch.ones_like(state.done))
