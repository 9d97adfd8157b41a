"""Several nets that answer together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparring.core.errors import UsageError
from sparring.guards.guard import Guard, Net, See


@dataclass(frozen=True)
class Ensemble(Guard):
    """log of the mean of softmax over the net and `others`: Strauss et al. 2017.

    `others` are torch modules in eval mode, from raw pixels to logits of the same classes.
    """

    others: tuple[Net, ...]

    name: ClassVar[str] = "ensemble"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Strauss et al. 2017, arXiv:1709.03423"
    differentiable: ClassVar[bool] = True
    randomised: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse an ensemble of one."""
        if not self.others:
            raise UsageError("expected other nets for an ensemble, got none")

    def answer(self, net: Net, x: Tensor, see: See) -> Tensor:
        """(n, classes) logarithms of the mean probabilities."""
        said = torch.stack([member(x).log_softmax(1) for member in (net, *self.others)])
        return said.logsumexp(0) - math.log(len(said))
