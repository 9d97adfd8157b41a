"""Plain training: the undefended reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparring.core.defense import Moment


@dataclass(frozen=True)
class Standard:
    """Cross-entropy on the images as they are."""

    name: ClassVar[str] = "standard"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "empirical risk minimisation"

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Tensor:
        """Mean cross-entropy."""
        return cross_entropy(net(x), y)
