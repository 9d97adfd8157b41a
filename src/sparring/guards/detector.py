"""A guard that flags images: the flag is one more class, and its threshold is set on clean images."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from sparring.core.errors import UsageError
from sparring.guards.guard import Guard, Net, See, Transform, plain

Again = Callable[[Transform], Tensor]  # the net's logits (n, classes) of the images behind a transform


@dataclass(frozen=True)
class Detector(Guard):
    """A guard that answers as the net does, and flags an image whose `score` is above `threshold` (see `fitted`)."""

    threshold: float | None = None

    detects: ClassVar[bool] = True

    @abstractmethod
    def score(self, x: Tensor, logits: Tensor, again: Again) -> Tensor:
        """(n,) how suspicious images `x` (n, c, h, w) with the net's `logits` (n, classes) are."""

    @final
    def fitted(self, net: Net, x: Tensor, rate: float = 0.05) -> Self:
        """The same with the threshold that flags a share of at most `rate` of clean images `x` (n, c, h, w).

        It flags floor(rate n) of them exactly, fewer only where scores are equal. Take images on which neither the
        net was trained nor the attack will be judged.
        """
        if not 0 <= rate < 1 or not len(x):
            raise UsageError(f"expected a false-positive rate in [0, 1) and images, got {rate} and {len(x)} images")
        with torch.no_grad():
            parts = [self._scored(net, part, plain)[1] for part in torch.split(x, 1000)]
        scores = torch.cat(parts).double().sort(descending=True).values
        flagged = int(rate * len(scores) + 1e-9)
        # Halfway, where the rounding of another width decides nothing.
        middle = (scores[flagged - 1] + scores[flagged]) / 2 if flagged else scores[0]
        return replace(self, threshold=float(middle))

    @final
    def answer(self, net: Net, x: Tensor, see: See) -> Tensor:
        """(n, classes + 1) logits; the flag's is max z + d (max z - min z) with d = score - threshold.

        Carlini and Wagner 2017, arXiv:1705.07263, have (d + 1) max z, which this is where min z is 0: so that it is
        the largest if and only if d > 0, whatever the sign of the logits.
        """
        if self.threshold is None:
            raise UsageError(f"expected {self.name} with a threshold; set it on clean images: guard.fitted(net, x)")
        logits, score = self._scored(net, x, see)
        excess = score - self.threshold
        top = logits.amax(1)
        flag = top + excess * (top - logits.amin(1))
        least = torch.nextafter(top.detach(), torch.full_like(top, torch.inf))  # where rounding hides the excess
        flag = torch.where((excess > 0) & (flag < least), least, flag)
        return torch.cat([logits, flag[:, None]], 1)

    def _scored(self, net: Net, x: Tensor, see: See) -> tuple[Tensor, Tensor]:
        logits = net(x)
        return logits, self.score(x, logits, lambda transform: net(see(transform, x)))
