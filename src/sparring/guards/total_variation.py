"""Total-variation denoising: the image near the given one that varies least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparring.core.errors import UsageError
from sparring.guards.guard import Transform


@dataclass(frozen=True)
class TotalVariation(Transform):
    """argmin_z 1/2 ||z - x||_2^2 + weight sum |z_i - z_j| over neighbours i, j.

    Of the total variance minimisation of Guo et al. 2018 no pixel is dropped at random, and the variation is the
    anisotropic one (Rudin, Osher and Fatemi 1992 have the other). Solved by `steps` accelerated projected-gradient
    steps on its dual (Beck and Teboulle 2009, "Fast gradient-based algorithms for constrained total variation image
    denoising", algorithm FGP), which are differentiated as they stand.
    """

    weight: float = 0.1
    steps: int = 50

    name: ClassVar[str] = "total_variation"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Guo et al. 2018, arXiv:1711.00117"
    differentiable: ClassVar[bool] = True
    randomised: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse what has no minimum, or none that is sought."""
        if not self.weight > 0 or self.steps < 1:
            raise UsageError(f"expected a positive weight and a step or more, got {self.weight} and {self.steps}")

    def transform(self, x: Tensor) -> Tensor:
        """(n, c, h, w) the denoised images."""
        down, right = torch.zeros_like(x[:, :, 1:]), torch.zeros_like(x[:, :, :, 1:])  # duals, in [-1, 1]
        ahead, beside, t = down, right, 1.0
        rate = 1 / (8 * self.weight)  # 8 bounds the squared norm of the differences
        for _ in range(self.steps):
            z = x - self.weight * _adjoint(ahead, beside)
            new_down = (ahead + rate * z.diff(dim=2)).clamp(-1, 1)
            new_right = (beside + rate * z.diff(dim=3)).clamp(-1, 1)
            grown = (1 + (1 + 4 * t * t) ** 0.5) / 2
            ahead = new_down + (t - 1) / grown * (new_down - down)
            beside = new_right + (t - 1) / grown * (new_right - right)
            down, right, t = new_down, new_right, grown
        return x - self.weight * _adjoint(down, right)


def _adjoint(down: Tensor, right: Tensor) -> Tensor:
    """The transpose of taking differences downwards (n, c, h - 1, w) and to the right (n, c, h, w - 1)."""
    pad = torch.nn.functional.pad
    return pad(down, (0, 0, 1, 0)) - pad(down, (0, 0, 0, 1)) + pad(right, (1, 0)) - pad(right, (0, 1))
