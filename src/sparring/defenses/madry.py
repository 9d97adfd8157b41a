"""Adversarial training: train on what an attack makes of each batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparring.core.attack import Attack
from sparring.core.batch import Batch
from sparring.core.defense import Moment
from sparring.core.threat import Threat
from sparring.engine.unroll import unroll
from sparring.models.torch import TorchModel


@dataclass(frozen=True)
class Madry:
    """min over weights of max over the threat model: Madry et al. 2018, equation 2.1.

    `attack` approximates the inner maximum. eps grows from 0 over the first `warmup` of the training, since
    a small net on MNIST does not start to learn at eps 0.3 at once.
    """

    attack: Attack
    threat: Threat
    warmup: float = 0.3

    name: ClassVar[str] = "madry"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Madry et al. 2018, arXiv:1706.06083"

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Tensor:
        """Mean cross-entropy at the attack's last points."""
        return self.cost(net, x, y, self.points(net, x, y, moment))

    def points(self, net: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Tensor:
        """(n, c, h, w) where the attack ends; the net is searched in eval mode."""
        threat = moment.limit(self.threat, self.warmup)
        mode = net.training
        net.eval()
        batch = Batch(x, y, torch.full_like(y, -1), moment.key, threat)
        worst = unroll(TorchModel(net, bounds=threat.bounds), self.attack, batch)
        net.train(mode)
        return worst

    def cost(self, net: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, points: Tensor) -> Tensor:
        """Mean cross-entropy at `points`."""
        return cross_entropy(net(points), y)
