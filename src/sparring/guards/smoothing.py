"""Gaussian noise on every image, and the class that most draws name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparring.core.errors import UsageError
from sparring.guards.guard import Transform


@dataclass(frozen=True)
class Smoothing(Transform):
    """argmax_c P(net(x + sigma e) = c), e standard normal: Cohen, Rosenfeld and Kolter 2019, equation 1.

    Judged by the majority of n draws, attacked through their mean probabilities (Salman et al. 2019,
    arXiv:1906.04584). Noisy pixels are not clipped. One draw of noise serves all rows of a call.
    """

    sigma: float = 0.25

    name: ClassVar[str] = "smoothing"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Cohen et al. 2019, arXiv:1902.02918"
    differentiable: ClassVar[bool] = True
    randomised: ClassVar[bool] = True
    votes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse what is no noise."""
        if not self.sigma > 0:
            raise UsageError(f"expected a positive sigma, got {self.sigma}")

    @property
    def gaussian_noise(self) -> float:
        """Sigma, in pixels of [0, 1]."""
        return self.sigma

    def transform(self, x: Tensor) -> Tensor:
        """(n, c, h, w) the noisy images."""
        return x + self.sigma * torch.randn(x.shape[1:], device=x.device, dtype=x.dtype)
