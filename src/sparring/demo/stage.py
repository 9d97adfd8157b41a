"""What the chapters of the story share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sparring.auditing.run import Run
from sparring.core.attack import Attack
from sparring.core.judge import Judge
from sparring.core.model import Model
from sparring.core.threat import Threat
from sparring.data.images import Dataset, Images
from sparring.engine.loop import run
from sparring.engine.outcome import Outcome
from sparring.models.wrap import wrap
from sparring.training.fit import Settings

CERTAIN = 0.9999  # the confidence that the classic attacks are held to


@dataclass(frozen=True)
class Scale:
    """How much of everything, for one kind of data."""

    eps: float  # what the hardened net is trained against
    small: float  # an eps at which the undefended net does not fall at once
    dense_steps: int = 2000
    conv_steps: int = 2345
    hardening_steps: int = 1800
    rows: int = 500

    @classmethod
    def fitting(cls, data: Dataset) -> Scale:
        """The usual radius for this kind of image, and a length that fits a demo."""
        channels, height, _ = data.train.x.shape[1:]
        if channels == 3:
            return cls(eps=8 / 255, small=2 / 255)
        if height < 16:
            return cls(eps=0.2, small=0.1, conv_steps=1000, hardening_steps=1000)
        return cls(eps=0.3, small=0.1)


@dataclass
class Stage:
    """The data, the nets trained so far, and where figures and pictures go."""

    data: Dataset
    scale: Scale
    run: Run
    seed: int = 0
    device: str = "cpu"
    framework: str = "torch"
    limit: int | None = None
    say: Callable[[str], None] = lambda _: None
    tick: Callable[[str, int, int], None] = lambda *_: None  # (what, done, of)
    nets: dict[str, object] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> Images:
        """The test rows that every attack meets."""
        return self.data.test.take(min(self.limit or self.scale.rows, len(self.data.test)))

    def model(self, name: str) -> Model:
        """A trained net, to be queried."""
        return wrap(self.nets[name])

    def settings(self, net: str, steps: int) -> Settings:
        """How to train one."""
        return Settings(net, steps, seed=self.seed, framework=self.framework)

    def attack(
        self,
        net: str,
        attack: Attack,
        threat: Threat,
        images: Images,
        target: Tensor | None = None,
        confidence: float = 0.0,
        eight_bit: bool = False,
    ) -> Outcome:
        """Run one attack on one net, with progress."""
        return run(
            self.model(net),
            attack,
            threat,
            images.x.to(self.device),
            images.y.to(self.device),
            sample=images.ids.to(self.device),
            targets=None if target is None else target.to(self.device)[:, None],
            judge=Judge(confidence),
            seed=self.seed,
            eight_bit=eight_bit,
            on_progress=lambda done, of: self.tick(f"{attack.name} on {net}", done, of),
        )

    def record(self, section: str, figures: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> None:
        """Keep a chapter's figures and pictures."""
        self.run.record(section, figures, tensors)
        self.figures[section] = figures
