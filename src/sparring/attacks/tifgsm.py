"""TI-FGSM: the gradient is smoothed, as if it were taken over all small shifts of the image."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.attacks.mifgsm import normalised
from sparring.core.attack import Observation, State
from sparring.core.batch import Batch
from sparring.core.errors import UsageError
from sparring.core.losses import named
from sparring.core.model import Access


@dataclass(frozen=True)
class TIFGSMState(State):
    """TI-FGSM's place, and where it is headed."""

    k: Tensor  # (n,) steps taken
    velocity: Tensor  # (n, c, h, w) the normalised, smoothed gradients so far, older ones fading


@dataclass(frozen=True)
class TIFGSM:
    """MI-FGSM with the gradient convolved with a Gaussian: Dong et al. 2019, section 3; momentum 0 is TI-BIM.

    `kernel` is the odd width of the Gaussian in pixels; left out, it is 15 as in the paper, or for images narrower
    than 60 pixels the largest odd number within a quarter of the shorter side: a wider one would leave nothing of
    a small picture's gradient (below 12 pixels, nothing is smoothed). `sigma` left out is the paper's k / sqrt(3)
    for a width of 2 k + 1; the authors' code has k / 3. `step_size` left out is eps / steps.
    """

    steps: int = 10
    step_size: float | None = None
    momentum: float = 1.0
    kernel: int | None = None
    sigma: float | None = None
    loss: str = "cross_entropy"

    name: ClassVar[str] = "tifgsm"
    version: ClassVar[int] = 1
    needs: ClassVar[Access] = Access.GRADIENT
    norms: ClassVar[tuple[str, ...]] = ("linf",)
    paper: ClassVar[str] = "Dong et al. 2019, arXiv:1904.02884"
    minimizes: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse a kernel without a middle."""
        if self.kernel is not None and (self.kernel < 1 or self.kernel % 2 == 0):
            raise UsageError(f"expected an odd kernel width, got {self.kernel}")
        if self.sigma is not None and self.sigma <= 0:
            raise UsageError(f"expected sigma > 0, got {self.sigma}")

    def init(self, batch: Batch) -> TIFGSMState:
        """Start at the clean image, at rest."""
        rest = torch.zeros_like(batch.x)
        return TIFGSMState(batch.x, torch.zeros_like(batch.targeted), torch.zeros_like(batch.y), rest)

    def step(self, batch: Batch, state: TIFGSMState, seen: Observation) -> TIFGSMState:
        """Smooth the gradient, add it, and move."""
        _, gradient = seen.value_and_grad(named(self.loss))
        size = batch.threat.eps / self.steps if self.step_size is None else self.step_size
        velocity = self.momentum * state.velocity + normalised(self._smooth(gradient))
        x = batch.project(state.x + size * batch.threat.steepest(velocity))
        k = state.k + 1
        return replace(state, x=x, k=k, velocity=velocity, done=k >= self.steps)

    def _smooth(self, gradient: Tensor) -> Tensor:
        """The convolution, with nothing beyond the border; a Gaussian is a product of one down and one across."""
        height, width = gradient.shape[2:]
        kernel = min(15, min(height, width) // 4) if self.kernel is None else self.kernel
        radius = max(kernel - 1, 0) // 2
        if radius == 0:
            return gradient
        sigma = radius / math.sqrt(3) if self.sigma is None else self.sigma
        down, across = (_blur(side, radius, sigma, gradient.device) for side in (height, width))
        return (down @ gradient.double() @ across).to(gradient.dtype)  # float64: no row hangs on its neighbours


def _blur(side: int, radius: int, sigma: float, device: torch.device) -> Tensor:
    """(side, side) float64: what each of a line's pixels gives to each other."""
    places = torch.arange(side, device=device)
    away = (places[:, None] - places).abs().double()
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1).double() / sigma).square())
    return torch.exp(-0.5 * (away / sigma).square()).masked_fill(away > radius, 0.0) / float(kernel.sum())
