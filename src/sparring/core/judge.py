"""The judge: it alone says what is adversarial."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.core import losses
from sparring.core.batch import Batch
from sparring.core.errors import ModelError, UsageError
from sparring.core.model import Access, Prediction


@dataclass(frozen=True)
class Judge:
    """A row is broken by a legal point that its model gets wrong, or puts in the row's target class.

    With `confidence` > 0 the model must also give the class it names at least that probability. With
    `any_wrong` a target is only where the attack aims, and any wrong class counts. A point that the model's own
    detector flags breaks nothing, unless it is the image itself, which nobody touched: then the row is lost.
    """

    confidence: float = 0.0
    any_wrong: bool = False

    def __post_init__(self) -> None:
        """Refuse what can be no probability."""
        if not 0 <= self.confidence < 1:
            raise UsageError(f"expected a confidence in [0, 1), got {self.confidence}")

    @property
    def needs(self) -> Access:
        """What the judge itself must see."""
        return Access.SCORE if self.confidence else Access.DECISION

    def fooled(self, batch: Batch, prediction: Prediction) -> Tensor:
        """(n,) bool: does the model answer as the attacker wants, wherever the point lies?"""
        labels, logits = prediction.labels, prediction.logits
        hit = labels != batch.y if self.any_wrong else (labels == batch.label) == batch.targeted
        if logits is not None and (bad := unanswered(logits)) is not None:
            hit = hit & ~bad
        if self.confidence:
            hit = hit & (confidence(prediction) >= self.confidence)
        return hit if prediction.flagged is None else hit & ~prediction.flagged

    def adversarial(self, batch: Batch, x: Tensor, prediction: Prediction) -> Tensor:
        """(n,) bool: is `x` a legal point that fools the model? Legality is computed in float64."""
        hit = self.fooled(batch, prediction)
        if prediction.flagged is not None:
            untouched = (x == batch.x).flatten(1).all(1) & (~batch.targeted | self.any_wrong)
            hit = hit | (prediction.flagged & untouched)
        index = hit.nonzero().squeeze(1)
        if len(index) == 0:
            return hit
        legal = batch.threat.contains(x[index], batch.x[index])
        return hit.index_copy(0, index, legal)

    def shortfall(self, batch: Batch, logits: Tensor) -> Tensor:
        """(n,) how far logits (n, classes) are from what the attacker wants: a margin, positive at a hit."""
        if not self.any_wrong:
            return losses.margin(logits, batch)
        right = logits.gather(1, batch.y[:, None]).squeeze(1)
        return logits.scatter(1, batch.y[:, None], -torch.inf).amax(1) - right


def weighed(batch: Batch, prediction: Prediction) -> Tensor | None:
    """(n, classes) logits as the attacker must see them: those of a model that detects count its flag as `y`."""
    if prediction.flagged is None or prediction.logits is None:
        return prediction.logits
    return losses.unflagged(prediction.logits, batch.y)


def unanswered(logits: Tensor) -> Tensor | None:
    """(n,) bool: rows whose logits are not finite; None when all are."""
    # The sum is finite unless an entry is not, or the entries are huge: it spares the full look.
    if logits.sum().isfinite():
        return None
    bad = ~logits.isfinite().all(1)
    return bad if bad.any() else None


def confidence(prediction: Prediction) -> Tensor:
    """(n,) float64 probability that the model gives the class it names."""
    if prediction.logits is None:
        raise ModelError("expected logits for a confidence, got a model that gives labels only")
    named = prediction.labels.clamp_min(0)  # -1 where the model failed; its logits are NaN there
    return prediction.logits.double().softmax(1).gather(1, named[:, None]).squeeze(1)
