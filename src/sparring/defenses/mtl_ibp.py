"""Certified training by halves: what an attack finds, and what intervals cannot rule out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from sparring.core.attack import Attack
from sparring.core.defense import Moment
from sparring.core.threat import Threat
from sparring.defenses.ibp import bounded, check_boundable, check_share, interval_margins, worst_case
from sparring.defenses.madry import Madry


@dataclass(frozen=True)
class MTLIBP:
    """(1 - alpha) CE(f(x'), y) + alpha CE(worst logits by intervals, y): De Palma et al. 2024, MTL-IBP, section 4.

    x' is where `attack` ends, as in `Madry`, and the worst logits are those of `IBP`. The
    mean lies between what is lost at least and at most, and `alpha` says where: 0 is `Madry`, 1 is intervals alone.
    A small one keeps more accuracy and asks for a stronger proof afterwards, such as branch and bound. For both, eps
    grows from 0 over the first `warmup` of the training.
    """

    attack: Attack
    threat: Threat
    alpha: float = 0.5
    warmup: float = 0.3

    name: ClassVar[str] = "mtl_ibp"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "De Palma et al. 2024, arXiv:2305.13991"

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        check_boundable(self.name, self.threat)
        check_share("alpha", self.alpha)
        check_share("warmup", self.warmup)

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Tensor:
        """The mean of both losses."""
        attacked = Madry(self.attack, self.threat, self.warmup).loss(net, x, y, moment)
        graph, where = bounded(net, x, self.threat, moment.risen(self.warmup))
        return (1 - self.alpha) * attacked + self.alpha * worst_case(interval_margins(graph, y, where))
