"""What something fitted does to other images, by one query each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.core.batch import Batch
from sparring.core.judge import Judge
from sparring.core.model import Model, passes
from sparring.core.threat import Threat, Unbounded
from sparring.engine.replay import replay
from sparring.fitted.untouched import Untouched

Apply = Callable[[Tensor, int], tuple[Tensor, Threat]]  # (rows, draw) -> their points, and what is legal there


@dataclass(frozen=True)
class Fooling:
    """Rows in the order they were given, and what the model says of each in every draw.

    Only rows that hold untouched are asked about again: right, and not of the class to reach.
    """

    sample: Tensor  # (n,) int64 ids
    y: Tensor  # (n,) int64
    held: Tensor  # (n,) bool: there was something to fool, and the model answered throughout
    failed: Tensor  # (n,) bool: the model had no answer, untouched or after
    clean_label: Tensor  # (n,) int64
    clean_confidence: Tensor  # (n,) float64
    fooled: Tensor  # (n, draws) bool: a legal image that fools the model
    label: Tensor  # (n, draws) int64, -1 where it was not asked
    confidence: Tensor  # (n, draws) float64, NaN where it was not asked
    illegal: int  # images that broke the threat model, and count as not fooling
    forward: int  # passes

    @property
    def rate(self) -> float:
        """The share fooled of rows that held, over all draws; NaN if none held."""
        return self.fooled[self.held].double().mean().item()

    def by_class(self, classes: int) -> list[tuple[int, float]]:
        """For each true class, how many rows held and which share of their images fooled; NaN of none."""
        told = []
        for label in range(classes):
            rows = self.held & (self.y == label)
            told.append((int(rows.sum()), self.fooled[rows].double().mean().item()))
        return told

    def named(self, classes: int) -> Tensor:
        """(classes,) int64: what the fooling images are taken for, per class named."""
        return torch.bincount(self.label[self.held][self.fooled[self.held]], minlength=classes)


def judge(model: Model, images: Untouched, apply: Apply, draws: int, confidence: float) -> Fooling:
    """Judge what `apply` makes of the rows that hold: legal by each row's own threat model, and fooling?"""
    count = len(images.y)
    fooled = torch.zeros(count, draws, dtype=torch.bool, device=images.y.device)
    label = torch.full((count, draws), -1, device=images.y.device)
    score = torch.full((count, draws), torch.nan, dtype=torch.float64, device=images.y.device)
    rows, illegal, court = images.held.nonzero().squeeze(1), 0, Judge(confidence)
    for draw in range(draws):
        for at in torch.split(rows, images.width):
            x = images.x[at]
            points, threat = apply(at, draw)
            batch = Batch(x, images.y[at], images.goal[at], images.sample[at], Unbounded(model.bounds))
            said = replay(model, court, batch, points, images.width)
            legal = threat.contains(points, x)
            fooled[at, draw], label[at, draw], score[at, draw] = said.hit & legal, said.label, said.score
            illegal += int((~legal).sum())
    failed = images.failed | (images.held & (label < 0).any(1))
    return Fooling(
        sample=images.sample,
        y=images.y,
        held=images.held & ~failed,
        failed=failed,
        clean_label=images.label,
        clean_confidence=images.confidence,
        fooled=fooled,
        label=label,
        confidence=score,
        illegal=illegal,
        forward=(count + len(rows) * draws) * passes(model),
    )
