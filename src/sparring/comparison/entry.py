"""What one attack reached and what it cost, in figures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.comparison.trial import Trial
from sparring.core.showing import mean, rounded
from sparring.core.threat import NORMS, Threat


@dataclass(frozen=True)
class Entry:
    """One attack: success and medians of the rows that held untouched, means over those that fell; None of nothing.

    A median counts a row that did not fall as infinitely far, so it is None where fewer than half of them fell.
    """

    name: str
    attack: str
    threat: str
    success: float | None
    eight_bit: float | None  # the share of those that fell whose image still fools as an 8-bit file
    confidence: float | None
    median: float | None  # distance in the threat model's own norm
    median_linf: float | None
    median_l2: float | None
    median_l1: float | None
    median_l0: float | None
    mean_linf: float | None
    mean_l2: float | None
    mean_l1: float | None
    mean_l0: float | None
    forward: int  # passes in all
    backward: int
    median_passes: float | None  # a row that held untouched
    unconfirmed: int  # images that fooled the model once and, judged again, did not
    failed: int  # rows that the model could not answer for
    seconds: float

    @classmethod
    def of(cls, trial: Trial, threat: Threat, x: Tensor) -> Entry:
        """The entry of a trial on images `x` (n, c, h, w)."""
        outcome = trial.outcome
        held = ~outcome.clean & ~outcome.failed
        fell = outcome.found & held
        best, origin = outcome.best[fell], x.to(outcome.best.device)[fell]
        away = {norm: kind(1.0).distance(best, origin) for norm, kind in NORMS.items()}
        halves = {f"median_{norm}": median(far, int(held.sum())) for norm, far in away.items()}
        passes = (outcome.forward + outcome.backward)[held]
        return cls(
            name=trial.name,
            attack=repr(trial.attack),
            threat=threat.describe(),
            success=rounded(outcome.success_rate),
            eight_bit=mean(trial.survives[fell]),
            confidence=mean(outcome.confidence[fell]),
            median=median(outcome.distance[fell], int(held.sum())),
            **halves,
            **{f"mean_{norm}": mean(far) for norm, far in away.items()},
            forward=int(outcome.forward.sum()),
            backward=int(outcome.backward.sum()),
            median_passes=median(passes.double(), len(passes)),
            unconfirmed=int(outcome.moved.sum()),
            failed=int(outcome.failed.sum()),
            seconds=round(trial.seconds, 3),
        )


def median(values: Tensor, rows: int) -> float | None:
    """The middle of `rows` values, of which those not given are infinite; None where that is infinite, or of none."""
    everything = torch.full((rows,), torch.inf, dtype=torch.float64)
    everything[: len(values)] = values.double().cpu()
    ordered = everything.sort().values
    if not rows or torch.isinf(ordered[rows // 2]):
        return None
    return rounded(float((ordered[(rows - 1) // 2] + ordered[rows // 2]) / 2))
