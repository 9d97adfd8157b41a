"""What the smallest distances found add up to: robust accuracy at every eps at once."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparring.auditing.standing import BROKEN, MISCLASSIFIED, Standing

STEPS = 256  # of the curve, at most
BINS = 24  # of the histogram
QUANTILES = (0.05, 0.25, 0.75, 0.95)


def falls(standing: Standing, eps: float) -> Tensor:
    """(n,) float64 the eps at which each row has fallen: its distance, 0 where misclassified, inf if none was found.

    A broken row has fallen at the audited eps, where the judge's slack may have let its image lie beyond.
    """
    return torch.where(standing.state == BROKEN, standing.reach.clamp_max(eps), standing.reach)


def share_at(curve: Mapping[str, list[float]], eps: float) -> float:
    """Robust accuracy at `eps` as a curve of steps has it."""
    return curve["robust_accuracy"][bisect_right(curve["eps"], eps) - 1]


def spread(standing: Standing, rows: int, eps: float) -> dict[str, Any]:
    """Median, mean, quantiles, histogram and curve of the distances of `rows` rows.

    Rows that are misclassified count with 0; those that have no distance, or have not been looked at, as farther
    than all others: the median is None where no half of the rows has fallen. The mean is over those that have one.
    """
    fallen = falls(standing, eps).sort().values
    found = fallen[fallen < torch.inf]
    right = standing.reach[(standing.state != MISCLASSIFIED) & (standing.reach < torch.inf)]
    stages = [standing.stages[_stage(standing.names[name])] for name in standing.near[standing.near >= 0].tolist()]
    return {
        "found": len(right),
        "none_found": rows - len(found),
        "median": _quantile(found, rows, 0.5),
        "mean": found.mean().item() if len(found) else None,
        "quantiles": {f"{share:g}": _quantile(found, rows, share) for share in QUANTILES},
        "curve": steps(found, rows, eps),
        "histogram": _histogram(right),
        "found_by": dict(Counter(stages)),
    }


def _stage(name: str) -> int:
    return int(name.split("-")[0])


def _quantile(found: Tensor, rows: int, share: float) -> float | None:
    """The least eps at which this share of all rows has fallen."""
    place = max(math.ceil(share * rows) - 1, 0)
    return found[place].item() if place < len(found) else None


def steps(found: Tensor, rows: int, eps: float) -> dict[str, list[float]]:
    """Where the share of rows that have not fallen changes, and to what; its first step is clean accuracy at 0.

    A long one is thinned: a step then takes place where the last of several does, so it stays an upper bound.
    """
    steps, count = torch.unique(found, return_counts=True)
    left = rows - count.cumsum(0)
    keep = torch.ones_like(steps, dtype=torch.bool)
    if len(steps) > STEPS:
        keep = torch.zeros_like(keep)
        keep[torch.linspace(0, len(steps) - 1, STEPS - 2).long()] = True
        within = int((steps <= eps).sum())
        keep[max(within - 1, 0)] = True
        keep[int((left > rows / 2).sum().clamp_max(len(steps) - 1))] = True
    at, share = steps[keep].tolist(), (left[keep].double() / rows).tolist()
    if not at or at[0] > 0:
        at, share = [0.0, *at], [1.0, *share]
    return {"eps": at, "robust_accuracy": share}


def _histogram(distances: Tensor) -> dict[str, list[float]] | None:
    """Rows by distance, of those that the model gets right when untouched; None when there are none."""
    if not len(distances):
        return None
    high = float(distances.max())
    counts = torch.histc(distances, BINS, 0.0, high) if high else torch.tensor([float(len(distances))])
    edges = torch.linspace(0.0, high, len(counts) + 1, dtype=torch.float64)
    return {"edges": edges.tolist(), "rows": counts.long().tolist()}
