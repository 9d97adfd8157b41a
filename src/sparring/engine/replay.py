"""Judging points once more, one query each: untouched images, and what a search has found."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparring.core.batch import Batch
from sparring.core.judge import Judge, confidence, weighed
from sparring.core.model import Access, Model, Prediction
from sparring.engine import width as widths
from sparring.engine.asking import ask


@dataclass(frozen=True)
class Judged:
    """What the judge and the model say of points, in their order."""

    hit: Tensor  # (n,) bool: a legal point that fools the model
    label: Tensor  # (n,) int64, -1 where the model failed
    score: Tensor  # (n,) float64 confidence; NaN from a model that gives labels only, or that failed
    logits: Tensor | None  # (n, classes) as the judge weighs them, or None from a model that gives labels only
    failed: dict[int, str] = field(default_factory=dict)


def replay(model: Model, judge: Judge, rows: Batch, points: Tensor, width: int) -> Judged:
    """Judge `points` (n, ...), one query each at a padded width."""
    while True:
        try:
            return _replay(model, judge, rows, points, width)
        except RuntimeError as error:
            if width == 1 or not widths.out_of_memory(error):
                raise
        width //= 2


def _replay(model: Model, judge: Judge, rows: Batch, points: Tensor, width: int) -> Judged:
    parts: list[Judged] = []
    access = min(model.access, Access.SCORE)
    failed: dict[int, str] = {}
    for start in range(0, len(points), width):
        index = torch.arange(start, start + width, device=points.device).clamp_max(len(points) - 1)
        count = min(width, len(points) - start)
        answer = ask(model, points[index], access)
        failed |= {start + row: why for row, why in answer.failed.items() if row < count}
        said = answer.prediction
        hit = said.labels >= 0
        if hit.any():  # else there is nothing to judge
            hit = hit & judge.adversarial(rows.take(index), points[index], said)
        weights = said.logits if said.flagged is None else weighed(rows.take(index), said)
        logits = None if weights is None else weights[:count]
        parts.append(Judged(hit[:count], said.labels[:count], score(said)[:count], logits))
    return Judged(
        torch.cat([part.hit for part in parts]),
        torch.cat([part.label for part in parts]),
        torch.cat([part.score for part in parts]),
        _logits(parts),
        failed,
    )


def _logits(parts: list[Judged]) -> Tensor | None:
    known = next((part.logits for part in parts if part.logits is not None), None)
    if known is None:
        return None
    blank = known.new_full((1, known.shape[1]), torch.nan)
    return torch.cat([blank.expand(len(p.label), -1) if p.logits is None else p.logits for p in parts])


def score(answer: Prediction) -> Tensor:
    """(n,) confidences, NaN where the model gives labels only or failed."""
    if answer.logits is None:
        return torch.full_like(answer.labels, torch.nan, dtype=torch.float64)
    return confidence(answer)
