"""Training on noisy images: the base classifier of randomised smoothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparring.core import noise
from sparring.core.defense import Moment
from sparring.core.errors import UsageError


@dataclass(frozen=True)
class Gaussian:
    """CE(f(x + e), y) with e ~ N(0, sigma^2): Cohen et al. 2019, section 3.3; one draw an image and step.

    `sigma` is in the units of the input and should be that of the smoothing. The noisy images are not clipped, since
    the smoothed classifier asks about unclipped ones.
    """

    sigma: float = 0.25

    name: ClassVar[str] = "gaussian"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Cohen et al. 2019, arXiv:1902.02918"

    def __post_init__(self) -> None:
        """Refuse what can be no deviation."""
        if not self.sigma >= 0:
            raise UsageError(f"expected sigma >= 0, got {self.sigma}; give it in the units of the input")

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Tensor:
        """Mean cross-entropy at the noisy images."""
        return cross_entropy(net(x + self.sigma * noise.normal(moment.key, x.shape[1:])), y)
