"""TRADES: accuracy on clean images plus a price for every answer that an attacker can change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from sparring.core import noise
from sparring.core.defense import Moment
from sparring.core.threat import Threat


@dataclass(frozen=True)
class TRADES:
    """CE(f(x), y) + beta max over the threat model of KL(f(x) || f(x')): Zhang et al. 2019, equation 5.

    The maximum is sought by `steps` projected steps from a point 0.001 away (their algorithm 1). Their 1 / lambda
    is `beta`. eps grows from 0 over the first `warmup` of the training, as in `Madry`.
    """

    threat: Threat
    beta: float = 1.0
    steps: int = 10
    warmup: float = 0.3

    name: ClassVar[str] = "trades"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Zhang et al. 2019, arXiv:1901.08573"

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Tensor:
        """Cross-entropy on clean images and beta times the mean divergence at the worst points found."""
        return self.cost(net, x, y, self.points(net, x, y, moment))

    def points(self, net: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Tensor:
        """(n, c, h, w) the worst points found in eval mode, within the eps of this moment."""
        threat = moment.limit(self.threat, self.warmup)
        mode = net.training
        net.eval()
        worst = self.worst(net, threat, x, moment.key)
        net.train(mode)
        return worst

    def cost(self, net: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, points: Tensor) -> Tensor:
        """Equation 5 with `points` for its maximum."""
        clean = net(x)
        return cross_entropy(clean, y) + self.beta * divergence(clean, net(points)).mean()

    def worst(self, net: nn.Module, threat: Threat, x: Tensor, key: Tensor) -> Tensor:
        """(n, c, h, w) legal points where the answer of `net` differs most from that for `x`."""
        with torch.no_grad():
            clean = net(x)
        point = threat.project(x + 0.001 * noise.normal(key, x.shape[1:]), x)
        for _ in range(self.steps):
            leaf = point.detach().requires_grad_()
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(divergence(clean, net(leaf)).sum(), leaf)
            point = threat.project(point + 2.5 * threat.eps / self.steps * threat.steepest(gradient, point), x)
        return point.detach()


def divergence(clean: Tensor, other: Tensor) -> Tensor:
    """(n,) KL divergences from softmax(`other`) to softmax(`clean`), of logits (n, classes)."""
    return kl_div(other.log_softmax(1), clean.log_softmax(1), reduction="none", log_target=True).sum(1)
