"""Asking a model so that one image it cannot answer does not sink the others."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sparring.core.errors import ModelError
from sparring.core.judge import unanswered
from sparring.core.model import Access, Model, Prediction


@dataclass(frozen=True)
class Answer:
    """A prediction, and why the rows without one have none."""

    prediction: Prediction  # where a row failed: label -1, logits NaN, gradient 0
    failed: dict[int, str] = field(default_factory=dict)


def ask(model: Model, x: Tensor, access: Access) -> Answer:
    """Query `model` about `x` (n, ...); a batch on which it raises is halved until the culprits stand alone."""
    try:
        prediction = model.query(x, access)
    except ModelError as error:
        if len(x) == 1:
            return Answer(_silence(x), {0: str(error)})
        return _join(ask(model, x[: len(x) // 2], access), ask(model, x[len(x) // 2 :], access))
    bad = None if prediction.logits is None else unanswered(prediction.logits)
    if bad is None or prediction.logits is None:
        return Answer(prediction)
    rows = bad.nonzero().squeeze(1).tolist()
    unnamed = replace(prediction, labels=prediction.labels.masked_fill(bad, -1))
    return Answer(unnamed, {row: f"expected finite logits, got {_brief(prediction.logits[row])}" for row in rows})


def _brief(logits: Tensor) -> str:
    told = ", ".join(f"{value:.4g}" for value in logits[:4].tolist())
    return f"[{told}{', ...' if len(logits) > 4 else ''}]"


def _silence(x: Tensor) -> Prediction:
    return Prediction(torch.full((1,), -1, device=x.device), None, lambda cotangent, keep=False: torch.zeros_like(x))


def _votes(first: Prediction, second: Prediction) -> Tensor | None:
    parts = [half.labels * 0.0 if half.votes is None else half.votes for half in (first, second)]
    return None if first.votes is None and second.votes is None else torch.cat(parts)


def _flagged(first: Prediction, second: Prediction) -> Tensor | None:
    parts = [half.labels < -1 if half.flagged is None else half.flagged for half in (first, second)]
    return None if first.flagged is None and second.flagged is None else torch.cat(parts)


def _join(one: Answer, two: Answer) -> Answer:
    """Two answers as one; the half that failed altogether takes the other's number of classes."""
    first, second = one.prediction, two.prediction
    count = len(first.labels)
    labels = torch.cat([first.labels, second.labels])
    failed = one.failed | {count + row: reason for row, reason in two.failed.items()}

    def pull(cotangent: Tensor, *, keep: bool = False) -> Tensor:
        halves = zip((first, second), (cotangent[:count], cotangent[count:]), strict=True)
        return torch.cat([half.vjp(part, keep=keep) for half, part in halves if half.vjp is not None])

    both = pull if first.vjp and second.vjp else None
    known = first.logits if first.logits is not None else second.logits
    if known is None:
        return Answer(Prediction(labels, None, both, _votes(first, second), _flagged(first, second)), failed)
    logits = torch.cat(
        [
            half.logits if half.logits is not None else known.new_full((len(half.labels), known.shape[1]), torch.nan)
            for half in (first, second)
        ]
    )
    return Answer(Prediction(labels, logits, both, _votes(first, second), _flagged(first, second)), failed)
