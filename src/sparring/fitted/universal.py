"""One perturbation that fools a model on as many images as it can."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparring.core import noise
from sparring.core.errors import UsageError
from sparring.core.model import Access, Model
from sparring.core.threat import Threat
from sparring.fitted.ascent import Ascent, Progress, Pull, climb
from sparring.fitted.fooling import Fooling, judge
from sparring.fitted.untouched import Given, look
from sparring.models.wrap import wrap

NORMS = ("linf", "l2", "l1")


@dataclass(frozen=True)
class Universal:
    """A universal perturbation (Moosavi-Dezfooli et al. 2017, arXiv 1610.08401, section 2) within `threat`."""

    delta: Tensor  # (c, h, w), in the units of the input
    threat: Threat
    target: int | None = None
    forward: int = 0  # passes that fitting took
    backward: int = 0

    def apply(self, x: Tensor) -> Tensor:
        """Images `x` (n, c, h, w) with the perturbation added, clipped to the bounds."""
        return self.threat.clip(x + self.delta)

    def control(self, seed: int = 0) -> Universal:
        """What was not fitted: random signs in Linf, else a random direction, as long as the threat model allows."""
        key = noise.keys(seed, *torch.zeros(2, 1, dtype=torch.int64, device=self.delta.device))
        drawn = noise.normal(key, self.delta.shape)
        direction = drawn.sign() if self.threat.norm == "linf" else drawn / self.threat.length(drawn.flatten(1))
        return replace(self, delta=_project(self.threat, direction[0] * self.threat.eps), forward=0, backward=0)

    def judge(self, model: object, test: Given, *, confidence: float = 0.0, width: int | None = None) -> Fooling:
        """Which of the images `test` it fools `model` on, which need not be the one it was fitted on.

        With `confidence` the model must give its wrong answer at least that probability.
        """
        queried = wrap(model)
        _check(queried, self.threat)
        images = look(queried, test, self.target, Access.DECISION, width)
        if images.x.shape[1:] != self.delta.shape:
            raise UsageError(f"expected images {tuple(self.delta.shape)}, got {tuple(images.x.shape[1:])}")
        return judge(queried, images, lambda at, _: (self.apply(images.x[at]), self.threat), 1, confidence)


def fit_universal(
    model: object,
    train: Given,
    threat: Threat,
    *,
    target: int | None = None,
    width: int | None = None,
    on_progress: Progress | None = None,
    **settings: Any,
) -> Universal:
    """Fit one perturbation within `threat` on the images of `train`, `Images` or (x (n, c, h, w), y (n,)).

    Shafahi et al. 2020 (arXiv 1811.11304), Algorithm 2, with the steepest step of the norm on a clipped margin.
    With `target` the model is to name that class, else any wrong one. `settings` are the fields of `Ascent`: steps,
    batch, rate, cap, seed. Only images that the model gets right are fitted on. Counted passes: one for each image
    of `train` to see which these are, and one forward and one backward for each image of each batch.
    """
    how, queried = Ascent(**settings), wrap(model)
    _check(queried, threat)
    images = look(queried, train, target, Access.GRADIENT, width)

    def render(delta: Tensor, rows: Tensor, step: int) -> tuple[Tensor, Pull]:
        added = images.x[rows] + delta
        return threat.clip(added), lambda gradient: _through_clip(gradient, added, threat.bounds).sum(0)

    def move(delta: Tensor, gradient: Tensor, rate: float) -> Tensor:
        return _project(threat, delta + rate * threat.eps * threat.steepest(gradient[None])[0])

    fit = climb(queried, images, how, torch.zeros_like(images.x[0]), render, move, on_progress)
    return Universal(fit.value, threat, target, fit.forward, fit.backward)


def _check(model: Model, threat: Threat) -> None:
    if threat.norm not in NORMS or not math.isfinite(threat.eps):
        raise UsageError(f"a universal perturbation works in {', '.join(NORMS)}, not in {threat.describe()}")
    if threat.bounds != model.bounds:
        raise UsageError(
            f"expected a threat model within the bounds of the model, {model.bounds}, got {threat.bounds}; "
            f"give it bounds={model.bounds}"
        )


def _project(threat: Threat, delta: Tensor) -> Tensor:
    """The nearest perturbation (c, h, w) of at most eps; an image's own bounds are met when it is added."""
    low, high = threat.bounds
    free = replace(threat, bounds=(low - high, high - low))
    return free.project(delta[None], torch.zeros_like(delta[None]))[0]


def _through_clip(gradient: Tensor, added: Tensor, bounds: tuple[float, float]) -> Tensor:
    """`gradient` at clip(added), back at `added`: nothing where it points further out of the bounds.

    Where it points back inside it counts, so that a pixel clipped in every image is not stuck there.
    """
    low, high = bounds
    return gradient.masked_fill(((added >= high) & (gradient > 0)) | ((added <= low) & (gradient < 0)), 0.0)
