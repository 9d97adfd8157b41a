"""What all defenses of a run share, and how a part that is done is not done again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparring.auditing.run import Run
from sparring.core import noise
from sparring.core.batch import Batch
from sparring.core.judge import Judge
from sparring.core.model import Model
from sparring.core.threat import Threat
from sparring.data.images import Images
from sparring.defending.workshop import Tell
from sparring.engine import width as widths
from sparring.engine.replay import Judged, replay


@dataclass(frozen=True)
class Bench:
    """What all defenses of a run share."""

    run: Run
    images: Images
    threat: Threat
    profile: str
    seed: int
    draws: int  # of a random guard, for each answer that decides
    device: str
    crafted: Mapping[str, Mapping[str, Tensor]]  # by net and attack: (n, c, h, w)
    tell: Tell

    def to(self, tensor: Tensor) -> Tensor:
        """`tensor` where the nets compute."""
        return tensor.to(self.device)

    def judge(self, judged: Model, points: Tensor, at: Tensor | None = None) -> Judged:
        """What `judged` says of `points` (m, c, h, w), one query each, made of the rows `at` (m,) (default: all)."""
        images = self.images if at is None else self.images.select(at)
        x, y, ids = self.to(images.x), self.to(images.y), self.to(images.ids)
        key = noise.keys(self.seed, ids, torch.zeros_like(ids))
        rows = Batch(x, y, torch.full_like(y, -1), key, self.threat)
        return replay(judged, Judge(), rows, self.to(points), widths.automatic(x[0]))

    def once(
        self, section: str, make: Callable[[], tuple[dict[str, Any], dict[str, Tensor]]]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Figures and tensors of a section, measured unless the run has it whole."""
        if self.run.figures(section) is None:
            self.run.record(section, *make())
        return self.run.figures(section) or {}, self.run.tensors(section)
