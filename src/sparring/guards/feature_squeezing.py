"""Feature squeezing: an image is flagged if the net says something else of it when it is squeezed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparring.core.errors import UsageError
from sparring.guards.bit_depth import BitDepth
from sparring.guards.detector import Again, Detector
from sparring.guards.guard import Transform
from sparring.guards.median import Median


@dataclass(frozen=True)
class FeatureSqueezing(Detector):
    """max over squeezers s of ||softmax z(x) - softmax z(s(x))||_1 > threshold: Xu et al. 2018, section V.

    The default `squeezers` are theirs for MNIST: one bit, and medians of 2 x 2.
    """

    squeezers: tuple[Transform, ...] = (BitDepth(1), Median(2))

    name: ClassVar[str] = "feature_squeezing"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Xu et al. 2018, arXiv:1704.01155"
    differentiable: ClassVar[bool] = False
    randomised: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse what squeezes nothing, or at random."""
        if not self.squeezers or any(squeezer.randomised for squeezer in self.squeezers):
            raise UsageError(f"expected squeezers that are not random, one or more, got {self.squeezers}")

    def score(self, x: Tensor, logits: Tensor, again: Again) -> Tensor:
        """(n,) the largest L1 distance, from 0 to 2."""
        before = logits.softmax(1)
        return torch.stack([(before - again(s).softmax(1)).abs().sum(1) for s in self.squeezers]).amax(0)
