"""Certified training by bounds that are linear near the logits and intervals below."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparring.certificates.crown import crown_ibp, interval_lines, lower_bounds
from sparring.certificates.graph import Graph
from sparring.certificates.region import Region
from sparring.core.defense import Moment
from sparring.core.threat import Threat
from sparring.defenses.ibp import bounded, check_boundable, check_share, interval_margins, worst_case


@dataclass(frozen=True)
class CrownIBP:
    """`IBP` on the margins (1 - b) m_IBP + b m_CROWN-IBP: Zhang et al. 2020, section 3.

    While eps grows from 0 over the first `warmup` of the training, b goes from 1 to `beta` and the share k of the
    clean loss from 1 to `kappa`. Linear bounds are far tighter than intervals at the start, where those of
    intervals only shrink the weights; with `beta` 0, their choice on MNIST at 0.3, the training ends as `IBP`.
    The linear bounds cost classes - 1 backward passes more; where b is 0 they cost nothing.
    """

    threat: Threat
    kappa: float = 0.0
    beta: float = 0.0
    warmup: float = 0.3

    name: ClassVar[str] = "crown_ibp"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Zhang et al. 2020, arXiv:1906.06316"

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        check_boundable(self.name, self.threat)
        check_share("kappa", self.kappa)
        check_share("beta", self.beta)
        check_share("warmup", self.warmup)

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Tensor:
        """The mean of both losses, in the shares of this moment."""
        ramp = moment.risen(self.warmup)
        graph, where = bounded(net, x, self.threat, ramp)
        linear, clean = (1 - ramp * (1 - end) for end in (self.beta, self.kappa))
        robust = worst_case(mixed_margins(graph, y, where, linear))
        return clean * cross_entropy(net(x), y) + (1 - clean) * robust if clean else robust


def mixed_margins(graph: Graph, y: Tensor, where: Region, linear: float) -> Tensor:
    """(n, classes - 1) what is proved of the margins of labels `y` (n,): `linear` parts CROWN-IBP, the rest IBP."""
    if not linear:
        return interval_margins(graph, y, where)
    relaxed = crown_ibp(graph, where)
    flat = interval_lines(graph, relaxed.bounds)
    by_lines, by_intervals = (lower_bounds(graph, y, lines, where)[0] for lines in (relaxed.lines, flat))
    return linear * by_lines + (1 - linear) * by_intervals
