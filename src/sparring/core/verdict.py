"""What can be said of one image, and what the counts say of robust accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class Verdict(StrEnum):
    """The five things that can be said of an image."""

    MISCLASSIFIED = "misclassified"  # wrong before any attack
    BROKEN = "broken"  # an adversarial image is on disk, and was judged again from there
    CERTIFIED = "certified"  # proved robust within the threat model
    UNDECIDED = "undecided"  # nothing tried here broke it, and no proof was found
    ERROR = "error"  # the model failed on it


ORDER = tuple(Verdict)


def robust_accuracy(counts: Mapping[str, int]) -> tuple[float, float] | tuple[None, None]:
    """The interval that holds the robust accuracy on these rows; a row in error may be either."""
    rows = sum(counts.values())
    if not rows:
        return None, None
    sure = counts.get(Verdict.CERTIFIED, 0)
    return sure / rows, (sure + counts.get(Verdict.UNDECIDED, 0) + counts.get(Verdict.ERROR, 0)) / rows
