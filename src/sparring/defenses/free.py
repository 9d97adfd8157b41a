"""Free adversarial training: the backward pass that moves the weights moves the attack as well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparring.core.defense import Moment
from sparring.core.errors import UsageError
from sparring.core.threat import Threat

_NORMS = ("linf", "l2")  # whose steepest step of length eps stays in a ball about 0


@dataclass(frozen=True)
class Free:
    """Each minibatch `replays` times, the perturbation d carried along: Shafahi et al. 2019, algorithm 1.

    A step descends CE(f(x + d), y), and its one backward pass also gives d <- clip(d + eps sign(g), -eps, eps), in l2
    a step of length eps along g. d goes on to the next minibatch. A step costs about a plain one; as many steps see
    `replays` times fewer different minibatches, so `--epochs` counts passes over the images, replays included. x + d
    is cut to the range of the pixels before the net sees it, and g is taken there. eps grows from 0 over the first
    `warmup`, as in `Madry`.
    """

    threat: Threat
    replays: int = 8
    warmup: float = 0.3

    name: ClassVar[str] = "free"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Shafahi et al. 2019, arXiv:1904.12843"

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.replays < 1:
            raise UsageError(f"expected each minibatch at least once, got replays={self.replays}")
        if self.threat.norm not in _NORMS:
            raise UsageError(f"expected linf or l2 for the steps of {self.name}, got {self.threat.norm}")

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Tensor:
        """Mean cross-entropy at x + d; its gradient in `x` is that at the legal point, whatever was cut off."""
        return cross_entropy(net(self.points(x.detach(), moment) + (x - x.detach())), y)

    def points(self, x: Tensor, moment: Moment) -> Tensor:
        """(n, c, h, w) the legal points that stand for x + d."""
        return x if moment.carried is None else moment.limit(self.threat, self.warmup).project(x + moment.carried, x)

    def hand_on(self, x: Tensor, gradient: Tensor, moment: Moment) -> Tensor:
        """(n, c, h, w) d after a step of eps along `gradient`, within eps."""
        threat = moment.limit(self.threat, self.warmup)
        before = torch.zeros_like(x) if moment.carried is None else moment.carried
        return threat.changes.project(before + threat.eps * threat.steepest(gradient), torch.zeros_like(x))
