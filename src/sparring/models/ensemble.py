"""Several models that answer as one, by the mean of their logits: what fools them all is likelier to fool another."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparring.core.errors import ModelError, UsageError
from sparring.core.model import Access, Model, Prediction, Sampled, fresh, passes
from sparring.models.wrap import wrap


class Ensemble(Sampled):
    """l(x) = sum_k w_k l_k(x), with the logits l_k and the weights w_k of its members.

    Dong et al. 2018, arXiv:1710.06081, equation 9. `models` are anything that `wrap` takes, with the
    same bounds and classes; `weights` (one a model, positive) are scaled to the sum of 1, and equal if left out.
    Its access is the least of its members'; a query costs what it costs each of them, one pass or several.
    """

    def __init__(self, models: Sequence[object], weights: Sequence[float] | None = None) -> None:
        if not models:
            raise UsageError("expected at least one model for an ensemble, got none")
        self.members = tuple(wrap(model) for model in models)
        weights = [1.0] * len(models) if weights is None else list(weights)
        if len(weights) != len(models) or not all(0 < weight < math.inf for weight in weights):
            raise UsageError(f"expected {len(models)} positive weights, one for each model, got {weights}")
        self.weights = tuple(weight / sum(weights) for weight in weights)
        self.bounds = self.members[0].bounds
        for member in self.members:
            if tuple(member.bounds) != tuple(self.bounds):
                raise ModelError(
                    f"expected members with the same bounds, got {self.bounds} and {member.bounds}; "
                    f"give all of them raw pixels, and mean and std to each: wrap(net, mean=..., std=...)"
                )
        self.access = min(member.access for member in self.members)
        if self.access < Access.SCORE:
            raise ModelError("expected members that give logits, got one that gives labels only; leave it out")

    @property
    def passes(self) -> int:
        """Those of its members together."""
        return sum(passes(member) for member in self.members)

    def fresh(self) -> Model:
        """The same, of other draws where members are random."""
        return Ensemble([fresh(member) for member in self.members], self.weights)

    def query(self, x: Tensor, access: Access) -> Prediction:
        """Answer for images `x` (n, c, h, w)."""
        answers = [member.query(x, max(access, Access.SCORE)) for member in self.members]
        logits = [answer.logits for answer in answers if answer.logits is not None]
        classes = sorted({each.shape[1] for each in logits})
        if len(logits) < len(answers) or len(classes) > 1:
            raise ModelError(f"expected logits of the same classes from all members, got {classes or 'labels only'}")
        fused = self._fuse(logits)
        labels, votes = fused.argmax(1), _votes(answers, fused.argmax(1))
        if access < Access.GRADIENT:
            return Prediction(labels, fused if access >= Access.SCORE else None, votes=votes)
        pullbacks = [answer.vjp for answer in answers if answer.vjp is not None]
        if len(pullbacks) < len(answers):
            raise ModelError("expected gradients from all members, got one that gives none")

        def pull(cotangent: Tensor, *, keep: bool = False) -> Tensor:
            return self._fuse([vjp(cotangent, keep=keep) for vjp in pullbacks])

        return Prediction(labels, fused, pull, votes)

    def _fuse(self, parts: Sequence[Tensor]) -> Tensor:
        """The weighted sum of the members' tensors: derivatives are linear too."""
        return torch.stack([weight * part for weight, part in zip(self.weights, parts, strict=True)]).sum(0)


def _votes(answers: Sequence[Prediction], labels: Tensor) -> Tensor | None:
    """(n,) of the random members' draws the least share that names `labels` (n,); None if no member is random."""
    shares = [torch.where(a.labels == labels, a.votes, 0.0) for a in answers if a.votes is not None]
    return torch.stack(shares).amin(0) if shares else None
