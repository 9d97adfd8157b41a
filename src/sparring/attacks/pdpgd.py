"""PDPGD: primal-dual descent with proximal steps; the nearest image in Linf, L2, L1 and L0."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.attacks.pdgd import PDGDState, answered, begun
from sparring.core.attack import Observation
from sparring.core.batch import Batch, per_row
from sparring.core.losses import margin
from sparring.core.model import Access

_HALVINGS = 40  # of an interval that holds a threshold: to float32


@dataclass(frozen=True)
class PDPGD:
    """Descend softplus(max(-margin, 0)), then take the proximal step of lambda_0 / lambda_1 times the norm.

    Matyasko and Chau 2021, primal-dual proximal gradient descent: as PDGD, but the norm, which may have no gradient,
    comes in by its proximal operator in Adam's metric (Melchior et al. 2019, arXiv:1910.10094), which is solved here,
    not iterated. In L0 features count, not pixels, and the operator is that of L1, whose images differ in few
    features too: L0's own, `hard`, cuts off at a threshold, and finds many more. `ratio`, left out, is 1, or 0.01
    with `hard` in L0. `step_size` is in units of the input, for a range of 1.
    """

    steps: int = 500
    step_size: float = 0.2
    dual_step: float = 0.1
    ratio: float | None = None
    hard: bool = False

    name: ClassVar[str] = "pdpgd"
    version: ClassVar[int] = 1
    needs: ClassVar[Access] = Access.GRADIENT
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1", "l0")
    paper: ClassVar[str] = "Matyasko and Chau 2021, arXiv:2106.01538"
    minimizes: ClassVar[bool] = True
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> PDGDState:
        """Start at the clean image, with lambda_0 / lambda_1 = `ratio`."""
        # A count does not shrink with the change: where it weighs much, no change is ever worth its price.
        usual = 0.01 if self._operator(batch) == "l0" else 1.0
        ratio = usual if self.ratio is None else self.ratio
        return begun(batch, ratio)

    def step(self, batch: Batch, state: PDGDState, seen: Observation) -> PDGDState:
        """Both players move."""
        value, climb = seen.value_and_grad(margin)
        slope = -per_row(torch.where(value <= 0, torch.sigmoid(-value), 0.0), climb).to(climb.dtype) * climb
        k = state.k + 1
        first = 0.9 * state.first + 0.1 * slope
        second = 0.999 * state.second + 0.001 * slope.square()
        metric = (second / per_row(1 - 0.999**k, slope)).sqrt() + 1e-8
        size = self.step_size * 0.01 ** (state.k / self.steps)
        move = per_row(size / (1 - 0.9**k), first) * first / metric
        delta = batch.threat.clip(state.x - move) - batch.x
        cost = size * (1 - state.weight) / state.weight
        delta = proximal(self._operator(batch), delta.flatten(1), metric.flatten(1), cost[:, None]).view_as(delta)
        x = batch.threat.clip(batch.x + delta)
        moved = replace(state, x=x, first=first, second=second)
        return answered(batch, state, moved, seen.adversarial, value, self.steps, self.dual_step)

    def _operator(self, batch: Batch) -> str:
        """The norm whose proximal operator is taken."""
        norm = batch.threat.norm
        return "l1" if norm == "l0" and not self.hard else norm


def proximal(norm: str, delta: Tensor, metric: Tensor, cost: Tensor) -> Tensor:
    """The z (n, d) that minimise 1/2 sum metric (z - delta)^2 + cost ||z||, for `metric` (n, d) and `cost` (n, 1)."""
    size = delta.abs()
    if norm == "l0":
        return delta.masked_fill(metric * size.square() < 2.0 * cost, 0.0)
    if norm == "l1":
        return delta.sign() * (size - cost / metric).clamp_min(0.0)
    above = size.amax(1, keepdim=True) if norm == "linf" else size.norm(dim=1, keepdim=True)
    below = torch.zeros_like(above)
    for _ in range(_HALVINGS):
        middle = (below + above) / 2
        if norm == "linf":  # at the optimum what is cut off weighs as much as the norm costs
            short = (metric * (size - middle).clamp_min(0.0)).sum(1, keepdim=True) > cost
        else:  # at the optimum `middle` is the length of z
            short = (metric * size / (metric * middle + cost).clamp_min(1e-38)).square().sum(1, keepdim=True) > 1
        below, above = torch.where(short, middle, below), torch.where(short, above, middle)
    if norm == "linf":
        return delta.clamp(-above, above)
    return delta * metric * above / (metric * above + cost).clamp_min(1e-38)
