"""The ways to prove a row, each by its name, and why a model gets none."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.certificates.bounds import METHODS as BOUNDS
from sparring.certificates.bounds import bounds
from sparring.certificates.graph import Trace, trace
from sparring.core.batch import Rows
from sparring.core.errors import ModelError, unknown
from sparring.core.model import Access, Model, Sampled
from sparring.core.threat import Threat

METHODS = BOUNDS
_LEAST = -1e300  # stands for a bound that says nothing


@dataclass(frozen=True)
class Proof(Rows):
    """What was found of each row's weakest margin: that of its label against the class that comes nearest."""

    certified: Tensor  # (n,) bool
    lower: Tensor  # (n,) float64 the bound below it, everywhere in the ball
    guard: Tensor  # (n,) float64 how much of that the model's own rounding can eat up

    @property
    def bound(self) -> Tensor:
        """(n,) float64 what is left: above 0 where all margins are proved."""
        return self.lower - self.guard


@dataclass(frozen=True)
class Provable:
    """A model that bounds can be computed for."""

    model: Model
    traced: Trace
    linear: bool

    def prove(self, method: str, x: Tensor, y: Tensor, threat: Threat) -> Proof:
        """What `method` proves of images `x` (n, c, h, w) with labels `y` (n,)."""
        if method not in METHODS:
            raise unknown("method", method, METHODS)
        found = bounds(self.model, x, y, threat, method, traced=self.traced, width=max(1, len(x)))
        spared = (found.lower - found.guard).nan_to_num(_LEAST, posinf=_LEAST, neginf=_LEAST)
        weakest = spared.argmin(1, keepdim=True)
        lower, guard = found.lower.gather(1, weakest).squeeze(1), found.guard.gather(1, weakest).squeeze(1)
        sound = found.certified & (spared > _LEAST).all(1)
        lower = torch.where(spared.gather(1, weakest).squeeze(1) > _LEAST, lower, _LEAST)
        return Proof(sound, lower, guard.nan_to_num(0.0, posinf=0.0))


def provable(model: Model, threat: Threat, shape: tuple[int, ...], device: str) -> Provable | str:
    """`model` ready to be proved things of, or in one line why nothing can be."""
    if threat.norm not in ("linf", "l2"):
        return f"no proof: bounds are known for linf and l2, not for {threat.norm}"
    if isinstance(model, Sampled):
        return "no proof: the model is random, and bounds hold for one answer, not for the vote of several draws"
    if model.access < Access.GRADIENT:
        return "no proof: expected a model that torch alone computes, got one that gives no gradients"
    try:
        traced = trace(model, shape, device)
        return Provable(model, traced, not traced.graph().activations())
    except ModelError as error:
        said = " ".join(str(error).split())
        said = said if said.startswith("no proof: ") else f"no proof: {said}"
        return said if len(said) <= 300 else f"{said[:297]}..."
