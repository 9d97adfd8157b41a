"""Training images that are kept from the training and attacked as it goes on, to keep the best weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sparring.core.attack import Attack
from sparring.core.errors import ModelError, UsageError
from sparring.core.model import Model
from sparring.core.threat import Threat
from sparring.data.images import Dataset, Images
from sparring.engine.loop import run


@dataclass(frozen=True)
class HoldBack:
    """The last `rows` training images: the weights under which most of them hold against `attack` are the result.

    Adversarial training overfits: robust accuracy falls long before the training ends, and stopping early wins back
    as much as newer recipes do (Rice et al. 2020, arXiv:2002.11569). With `patience` the training ends after so many
    lines of the log without gain; without it, it runs to its end, and the best weights seen at a line are kept.
    """

    rows: int
    threat: Threat
    attack: Attack
    patience: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.rows < 1 or (self.patience is not None and self.patience < 1):
            raise UsageError(
                f"expected to hold back at least 1 image, and a patience of at least 1 line, "
                f"got {self.rows} and {self.patience}"
            )

    def split(self, data: Dataset) -> tuple[Dataset, Images]:
        """`data` without the images held back, and these."""
        cut = len(data.train) - self.rows
        if cut < 1:
            raise UsageError(
                f"expected to hold back fewer than all {len(data.train)} training images, got {self.rows}"
            )
        index = torch.arange(len(data.train))
        return replace(data, train=data.train.select(index[:cut])), data.train.select(index[cut:])

    def robust_accuracy(self, model: Model, images: Images, seed: int, device: str = "cpu") -> float:
        """The share of `images` that hold, each under the same noise at every line; 0 of a net that has diverged."""
        x, y, ids = (part.to(device) for part in (images.x, images.y, images.ids))
        try:
            found = run(model, self.attack, self.threat, x, y, sample=ids, seed=seed)
        except ModelError:  # no finite answer to anything
            return 0.0
        return (~found.found & ~found.failed).double().mean().item()

    def plan(self) -> dict[str, Any]:
        """What decides the weights, as JSON values."""
        return {"options": repr(self), "attack_version": self.attack.version}

    def over(self, shares: Sequence[float]) -> bool:
        """After lines with these robust accuracies, is the training to end?"""
        return self.patience is not None and bool(shares) and len(shares) - 1 - best(shares) >= self.patience


def best(shares: Sequence[float]) -> int:
    """Where the highest of `shares` stands; the first of equals."""
    return max(range(len(shares)), key=lambda place: (shares[place], -place))
