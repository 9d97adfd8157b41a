"""Defensive distillation: a student learns a teacher's soft answers, both at a high temperature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparring.core.defense import Moment
from sparring.core.errors import UsageError
from sparring.core.model import Access
from sparring.models.checkpoint import Checkpoint
from sparring.models.wrap import wrap


@dataclass(frozen=True)
class Temperature:
    """CE(f(x) / T, y): how the teacher of a `Distillation` is trained (Papernot et al. 2016, section IV)."""

    temperature: float = 40.0

    name: ClassVar[str] = "temperature"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Papernot et al. 2016, arXiv:1511.04508"

    def __post_init__(self) -> None:
        """Refuse what can be no temperature."""
        _check(self.temperature)

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Tensor:
        """Mean cross-entropy of the tempered logits."""
        return cross_entropy(net(x) / self.temperature, y)


@dataclass(frozen=True, repr=False)
class Distillation:
    """CE of softmax(f(x) / T) against softmax(teacher(x) / T): Papernot et al. 2016, section IV.

    The teacher is a checkpoint that `Temperature` trained at the same temperature. The student is stored as it is, so
    it answers at temperature 1, as they deploy it: its logits are about T times too large, softmax saturates, and the
    gradient of its cross-entropy vanishes. That hides the way from weak attacks and does not close it (Carlini and
    Wagner 2017, arXiv:1608.04644): judge it with attacks on the logits, such as `apgd` with the loss `dlr`.
    """

    teacher: Checkpoint
    temperature: float = 40.0

    name: ClassVar[str] = "distillation"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Papernot et al. 2016, arXiv:1511.04508"

    def __post_init__(self) -> None:
        """Refuse what can be no temperature, and a teacher that was trained otherwise."""
        _check(self.temperature)
        wanted = Temperature(self.temperature)
        found = self.teacher.card["plan"]["recipe"]["options"]
        if found != repr(wanted):
            raise UsageError(
                f"expected a teacher trained with {wanted!r}, got {found}; "
                f"train one with --recipe temperature:temperature={self.temperature:g}"
            )

    def __repr__(self) -> str:
        """The options as a plan keeps them: the teacher by the digest of its weights."""
        digest = self.teacher.card["weights_sha256"]
        return f"Distillation(teacher={digest!r}, temperature={self.temperature})"

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Tensor:
        """Mean cross-entropy of the tempered logits against the teacher's answers; the labels are not used."""
        return cross_entropy(net(x) / self.temperature, self.answers(x))

    def answers(self, x: Tensor) -> Tensor:
        """(n, classes) the teacher's probabilities at the temperature; no gradient goes through them."""
        net = self.teacher.net
        logits = wrap(net.to(x.device) if isinstance(net, nn.Module) else net).query(x, Access.SCORE).logits
        assert logits is not None  # a checkpoint of ours gives scores
        return (logits / self.temperature).softmax(1)


def _check(temperature: float) -> None:
    if not 0 < temperature < float("inf"):
        raise UsageError(f"expected a temperature above 0, such as 40, got {temperature}")
