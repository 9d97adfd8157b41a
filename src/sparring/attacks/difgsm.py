"""DI-FGSM: the model sees the image shrunk and shifted at random, so that the noise fits no one model too well."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.attacks.mifgsm import normalised
from sparring.core import noise
from sparring.core.attack import Observation, State
from sparring.core.batch import Batch, per_row
from sparring.core.losses import named
from sparring.core.model import Access


@dataclass(frozen=True)
class DIFGSMState(State):
    """DI-FGSM's place; `x` is a random view of it and no legal point, but the last one is the place itself."""

    k: Tensor  # (n,) steps taken
    place: Tensor  # (n, c, h, w) x_t of the paper
    velocity: Tensor  # (n, c, h, w) the normalised gradients so far, older ones fading


@dataclass(frozen=True)
class DIFGSM:
    """MI-FGSM with the gradient of the loss at T(x), a random view: Xie et al. 2019, section 3 (M-DI^2-FGSM).

    With `probability`, T resizes the image and pads it with zeros on all sides at random, else it leaves it alone;
    with `momentum` 0 it is DI^2-FGSM. Models here take one size only, so T shrinks the sides, to no less than `rate`
    of them, where the paper enlarges them by up to a tenth; at 0.9, images below 11 pixels stay as they are.
    `step_size` left out is eps / steps.
    """

    steps: int = 10
    step_size: float | None = None
    momentum: float = 1.0
    probability: float = 0.5
    rate: float = 0.9
    loss: str = "cross_entropy"

    name: ClassVar[str] = "difgsm"
    version: ClassVar[int] = 1
    needs: ClassVar[Access] = Access.GRADIENT
    norms: ClassVar[tuple[str, ...]] = ("linf",)
    paper: ClassVar[str] = "Xie et al. 2019, arXiv:1803.06978"
    minimizes: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> DIFGSMState:
        """Start at the clean image, at rest."""
        zero = torch.zeros_like(batch.y)
        x, rest = self._view(batch, batch.x, zero), torch.zeros_like(batch.x)
        return DIFGSMState(x, torch.zeros_like(batch.targeted), zero, batch.x, rest)

    def step(self, batch: Batch, state: DIFGSMState, seen: Observation) -> DIFGSMState:
        """Pull the gradient back through the view, add it, move, and view the next place."""
        _, gradient = seen.value_and_grad(named(self.loss))
        down, across = self._lenses(batch, state.k)
        pulled = (down.mT @ gradient.double() @ across).to(gradient.dtype)
        size = batch.threat.eps / self.steps if self.step_size is None else self.step_size
        velocity = self.momentum * state.velocity + normalised(pulled)
        place = batch.project(state.place + size * batch.threat.steepest(velocity))
        k = state.k + 1
        done = k >= self.steps
        x = torch.where(per_row(done, place), place, self._view(batch, place, k))
        return replace(state, x=x, k=k, place=place, velocity=velocity, done=done)

    def _view(self, batch: Batch, place: Tensor, k: Tensor) -> Tensor:
        """T(`place`) of the k-th step, within the pixel range; zeros stand for the pixel value nearest to 0."""
        down, across = self._lenses(batch, k)
        dark = batch.threat.clip(torch.zeros_like(place))
        seen = down @ (place - dark).double() @ across.mT  # float64: no row hangs on its neighbours
        return batch.threat.clip((dark + seen).to(place.dtype))

    def _lenses(self, batch: Batch, k: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 1, h, h) and (n, 1, w, w) float64: T is linear, and takes x to down x across^T."""
        changed, scale, top, left = noise.uniform(batch.key, (4,), k).double().unbind(1)
        height, width = batch.x.shape[2:]
        scale = torch.where(changed < self.probability, scale, 1.0)  # 1, which no draw is, leaves the image alone
        return self._lens(height, scale, top), self._lens(width, scale, left)

    def _lens(self, side: int, scale: Tensor, shift: Tensor) -> Tensor:
        """Bilinear resizing of a line of `side` pixels to fewer, put somewhere on a dark line of `side` pixels."""
        least = min(math.ceil(self.rate * side - 1e-9), side)
        size = torch.where(scale < 1, least + (scale * (side - least)).floor(), side)[:, None, None]
        first = (shift[:, None, None] * (side - size + 1)).floor()
        places = torch.arange(side, device=scale.device).double()
        source = (places[:, None] - first + 0.5) * side / size - 0.5
        inside = (places[:, None] >= first) & (places[:, None] < first + size)
        return ((1 - (source - places).abs()).clamp_min(0.0) * inside)[:, None]
