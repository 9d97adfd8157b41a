"""MART: adversarial training that leans on the images that are misclassified before any attack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparring.core.attack import Attack
from sparring.core.defense import Moment
from sparring.core.threat import Threat
from sparring.defenses.madry import Madry
from sparring.defenses.trades import divergence


@dataclass(frozen=True)
class MART:
    """BCE(x', y) + beta KL(p(x) || p(x')) (1 - p_y(x)): Wang et al. 2020, section 3.

    BCE(x', y) = -log p_y(x') - log(1 - max_{k != y} p_k(x')), the boosted cross-entropy. `attack` makes x' by
    cross-entropy, as in `Madry`, with its warm-up of eps. Their lambda is `beta`, 6 as in their code.
    """

    attack: Attack
    threat: Threat
    beta: float = 6.0
    warmup: float = 0.3

    name: ClassVar[str] = "mart"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Wang et al. 2020, ICLR, openreview.net/forum?id=rklOg6EFwS"

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Tensor:
        """The mean of the sum at the attack's last points."""
        return self.cost(net, x, y, self.points(net, x, y, moment))

    def points(self, net: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Tensor:
        """(n, c, h, w) where the attack ends."""
        return Madry(self.attack, self.threat, self.warmup).points(net, x, y, moment)

    def cost(self, net: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, points: Tensor) -> Tensor:
        """The mean of the sum at `points`; gradients go through the weight 1 - p_y(x) too, as in their code."""
        clean, other = net(x), net(points)
        wrong = 1 - clean.softmax(1).gather(1, y[:, None]).squeeze(1)
        return boosted(other, y) + self.beta * (divergence(clean, other) * wrong).mean()


def boosted(logits: Tensor, y: Tensor) -> Tensor:
    """The mean boosted cross-entropy of `logits` (n, classes).

    log(1 - p_k) is taken as the difference of two log-sums, which stays finite where p_k rounds to 1.
    """
    rival = logits.detach().scatter(1, y[:, None], -float("inf")).argmax(1, keepdim=True)
    others = logits.scatter(1, rival, -float("inf")).logsumexp(1)
    return cross_entropy(logits, y) + (logits.logsumexp(1) - others).mean()
