"""The ways to prove a row, each by its name, and why a model gets none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparring.certificates.bounds import METHODS as BOUNDS
from sparring.certificates.bounds import bounds
from sparring.certificates.branch import BROKEN, PROVED, Decision, certify
from sparring.certificates.graph import OutOfTime, Trace, trace
from sparring.core.batch import Rows
from sparring.core.errors import ModelError, unknown
from sparring.core.model import Access, Model, Sampled
from sparring.core.threat import Threat

METHODS = (*BOUNDS, "branch")
NODES = 1024  # subproblems for each image, if nobody says how many
Stop = Callable[[], bool]
_LEAST = -1e300  # stands for a bound that says nothing


def never() -> bool:
    """There is time for all."""
    return False


class _Enough(Exception):
    """Branch and bound has had its share."""

    def __init__(self, decision: Decision) -> None:
        self.decision = decision


@dataclass(frozen=True)
class Proof(Rows):
    """What was found of each row's weakest margin: that of its label against the class that comes nearest."""

    certified: Tensor  # (n,) bool
    lower: Tensor  # (n,) float64 the bound below it, everywhere in the ball
    guard: Tensor  # (n,) float64 how much of that the model's own rounding can eat up
    broken: Tensor  # (n,) bool: `worst` is a legal image that is read as another class
    worst: Tensor  # (n, c, h, w)

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

    def prove(
        self, method: str, x: Tensor, y: Tensor, threat: Threat, nodes: int = NODES, stop: Stop = never
    ) -> Proof:
        """What `method` proves of images `x` (n, c, h, w) with labels `y` (n,).

        Branch and bound ends when it has looked at `nodes` subproblems for each image. `OutOfTime` if `stop` says
        so before all is done.
        """
        if method not in METHODS:
            raise unknown("method", method, METHODS)

        def pause() -> None:
            if stop():
                raise OutOfTime

        traced = replace(self.traced, pause=pause)
        if method == "branch":
            return self._branch(traced, x, y, threat, nodes * len(x))
        found = bounds(self.model, x, y, threat, method, traced=traced, width=max(1, len(x)))
        spared = (found.lower - found.guard).nan_to_num(_LEAST, posinf=_LEAST, neginf=_LEAST)
        weakest = spared.argmin(1, keepdim=True)
        lower, guard = found.lower.gather(1, weakest).squeeze(1), found.guard.gather(1, weakest).squeeze(1)
        sound = found.certified & (spared > _LEAST).all(1)
        lower = torch.where(spared.gather(1, weakest).squeeze(1) > _LEAST, lower, _LEAST)
        return Proof(sound, lower, guard.nan_to_num(0.0, posinf=0.0), torch.zeros_like(sound), found.worst)

    def _branch(self, traced: Trace, x: Tensor, y: Tensor, threat: Threat, nodes: int) -> Proof:
        """Branch and bound, whose bounds have the guard taken off already."""

        def tell(so_far: Decision) -> None:
            if int(so_far.nodes.sum()) >= nodes:
                raise _Enough(so_far)

        try:
            found = certify(self.model, x, y, threat, traced=traced, tell=tell)
            certified, broken, lower, worst = found.certified, found.broken, found.lower, found.worst
        except _Enough as enough:
            told = enough.decision
            certified, broken, lower = told.state == PROVED, told.state == BROKEN, told.lower
            worst = threat.project(told.point.to(x.dtype), x)
        lower = lower.nan_to_num(_LEAST, posinf=_LEAST, neginf=_LEAST)
        return Proof(certified & (lower > 0), lower, torch.zeros_like(lower), broken, worst)


def hopeless(model: Model, threat: Threat) -> str | None:
    """In one line why nothing can be proved, where that is plain before the model is traced."""
    if threat.norm not in ("linf", "l2"):
        return f"no proof: bounds are known for linf and l2, not for {threat.norm}"
    if isinstance(model, Sampled):
        return "no proof: the model is random, and bounds hold for one answer, not for the vote of several draws"
    if model.access < Access.GRADIENT:
        return "no proof: expected a model that torch alone computes, got one that gives no gradients"
    return None


def provable(model: Model, threat: Threat, shape: tuple[int, ...], device: str) -> Provable | str:
    """`model` ready to be proved things of, or in one line why nothing can be."""
    if (why := hopeless(model, threat)) is not None:
        return why
    try:
        traced = trace(model, shape, device)
        return Provable(model, traced, not traced.graph().activations())
    except ModelError as error:
        said = " ".join(str(error).split())
        said = said if said.startswith("no proof: ") else f"no proof: {said}"
        return said if len(said) <= 300 else f"{said[:297]}..."
