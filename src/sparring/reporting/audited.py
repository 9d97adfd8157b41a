"""What the panels of an audit share: its verdicts on the accuracy axis, its pixel range, its bill."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparring.core.verdict import Verdict

AXIS = (Verdict.CERTIFIED, Verdict.UNDECIDED, Verdict.ERROR, Verdict.BROKEN, Verdict.MISCLASSIFIED)
MEANING = {
    Verdict.CERTIFIED: "proved robust within the threat model",
    Verdict.UNDECIDED: "not broken by anything tried here, and not proved robust: it may be either",
    Verdict.ERROR: "the model failed on it: it may be either",
    Verdict.BROKEN: "an adversarial image is on disk, and was judged again from there",
    Verdict.MISCLASSIFIED: "wrong before any attack",
}

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class After:
    """Where an audit stood when a stage was over."""

    number: int
    name: str
    passes: float  # forward and backward, of all stages so far, per image
    upper: float  # share of images neither misclassified nor broken by then


def pixel_range(plan: Figures) -> tuple[float, float]:
    """The bounds of the threat model, (0, 1) where the plan does not say."""
    said = re.search(r"bounds=\((-?[\d.e+-]+), (-?[\d.e+-]+)\)", str((plan.get("settings") or {}).get("threat", "")))
    return (float(said[1]), float(said[2])) if said else (0.0, 1.0)


def passes(part: Figures) -> int:
    """Forward and backward passes of a stage, or of what else was done."""
    return int((part.get("forward") or 0) + (part.get("backward") or 0))


def total(figures: Figures) -> int:
    """Forward and backward passes that the verdicts took."""
    return int((figures.get("forward_passes") or 0) + (figures.get("backward_passes") or 0))


def progress(figures: Figures) -> list[After]:
    """The upper end of robust accuracy after each stage."""
    rows, spent = figures.get("rows") or 0, 0
    standing = rows - (figures.get("counts") or {}).get(Verdict.MISCLASSIFIED, 0)
    reached = []
    for stage in figures.get("stages") or [] if rows else []:
        spent += passes(stage)
        standing -= stage.get("broken") or 0
        reached.append(After(stage.get("stage", 0), stage.get("name", ""), spent / rows, standing / rows))
    return reached
