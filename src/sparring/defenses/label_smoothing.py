"""Label smoothing: targets that leave some probability to the wrong classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparring.core.defense import Moment
from sparring.core.errors import UsageError


@dataclass(frozen=True)
class LabelSmoothing:
    """Cross-entropy against (1 - smoothing) [k = y] + smoothing / classes: Szegedy et al. 2016, section 7.

    It keeps logits close together, which blunts attacks that climb the loss more than it makes a net robust.
    """

    smoothing: float = 0.1

    name: ClassVar[str] = "label_smoothing"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Szegedy et al. 2016, arXiv:1512.00567"

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        if not 0 <= self.smoothing <= 1:
            raise UsageError(f"expected smoothing from 0 to 1, got {self.smoothing}")

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Tensor:
        """Mean cross-entropy against the smoothed labels."""
        return cross_entropy(net(x), y, label_smoothing=self.smoothing)
