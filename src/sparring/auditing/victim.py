"""The model as an audit meets it: nothing about it is refused that can be audited and be said."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparring.core.errors import AttackError, DataError, UsageError
from sparring.core.model import Access, Model, Prediction, Pullback, Sampled, fresh, passes
from sparring.core.threat import Threat
from sparring.data.images import Images
from sparring.engine import preflight
from sparring.engine.asking import ask

_LOOKED_AT = 64  # images, to see what kind of answers come
_CHUNK = 4096  # images checked at once: a check must not double the memory


@dataclass(frozen=True)
class Victim(Sampled):
    """A model, with the access that it turned out to give, and logarithms where it answers in probabilities."""

    model: Model
    access: Access
    classes: int
    probabilities: bool = False

    @property
    def bounds(self) -> tuple[float, float]:
        """The range of its pixels."""
        return self.model.bounds

    @property
    def passes(self) -> int:
        """As the model has it."""
        return passes(self.model)

    def fresh(self) -> Victim:
        """The same around the model that confirms."""
        return replace(self, model=fresh(self.model))

    def query(self, x: Tensor, access: Access) -> Prediction:
        """Ask the model; log p serves as well as logits where softmax did not round to 0."""
        answer = self.model.query(x, access)
        if not self.probabilities or answer.logits is None:
            return answer
        p = answer.logits.clamp_min(1e-38)
        return replace(answer, logits=p.log(), vjp=None if answer.vjp is None else _through_log(answer.vjp, p))


def _through_log(vjp: Pullback, p: Tensor) -> Pullback:
    def pull(cotangent: Tensor, *, keep: bool = False) -> Tensor:
        return vjp(cotangent / p, keep=keep)

    return pull


def meet(model: Model, images: Images, threat: Threat, device: str) -> Victim:
    """The victim that `model` is, once images, labels and threat model are found to fit it."""
    if threat.norm not in ("linf", "l2", "l1"):
        raise UsageError(f"an audit works in linf, l2 and l1, not in {threat.norm}; name another norm")
    if threat.bounds != model.bounds:
        raise UsageError(
            f"expected a threat model within the bounds of the model, {model.bounds}, got {threat.bounds}; "
            f"give it bounds={model.bounds}"
        )
    preflight.check_labels(images.y, len(images.x))
    if len(torch.unique(images.ids)) != len(images.x):
        raise DataError("expected an id of its own for every image, got some twice; number them anew")
    if not math.isfinite(threat.eps):
        raise UsageError(f"expected a finite eps, got {threat.eps}")
    for part in torch.split(images.x, _CHUNK):
        preflight.check_images(part, model.bounds)
    sample = images.x[torch.linspace(0, len(images) - 1, min(_LOOKED_AT, len(images))).long()].to(device)
    answer = ask(model, sample.clone(), min(model.access, Access.SCORE))
    fine = [row for row in range(len(sample)) if row not in answer.failed]
    if not fine:
        preflight.check_model(model, sample)  # says so
    logits = answer.prediction.logits
    if logits is None:
        raise AttackError(
            "an audit needs at least scores, and the model gives labels only; let it give logits or probabilities"
        )
    preflight.check_labels(images.y, len(images.x), classes=logits.shape[1])
    said = logits[fine]
    simplex = bool((said > -1e-5).all()) and bool(((said.double().sum(1) - 1).abs() < 1e-5).all())
    return Victim(model, _access(model, sample[fine]), logits.shape[1], simplex)


def _access(model: Model, sample: Tensor) -> Access:
    """What the model gives in fact: gradients only if it has any for one of these images."""
    if model.access < Access.GRADIENT:
        return Access.SCORE
    refused = ask(model, sample[:4].clone(), Access.GRADIENT).failed
    return Access.SCORE if len(refused) == min(4, len(sample)) else Access.GRADIENT
