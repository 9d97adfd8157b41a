"""A detector on the logits: an image is flagged that speaks for no class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparring.guards.detector import Again, Detector


@dataclass(frozen=True)
class Energy(Detector):
    """-logsumexp z(x) > threshold: Liu et al. 2020 at T = 1, made for images out of distribution.

    An attack that is unaware of it stops where two classes meet, and there the energy is high.
    """

    name: ClassVar[str] = "energy"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Liu et al. 2020, arXiv:2010.03759"
    differentiable: ClassVar[bool] = True
    randomised: ClassVar[bool] = False

    def score(self, x: Tensor, logits: Tensor, again: Again) -> Tensor:
        """(n,) energies."""
        return -logits.logsumexp(1)
