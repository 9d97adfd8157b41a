"""Adversarial weight perturbation: descend where the weights, too, are a little worse than they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sparring.core.defense import Defense, Moment
from sparring.core.errors import UsageError


@runtime_checkable
class Adversarial(Defense, Protocol):
    """A defense that first seeks points and then weighs them: its loss is `cost` at `points`."""

    def points(self, net: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Tensor:
        """(n, c, h, w) the points to train on."""
        ...

    def cost(self, net: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, points: Tensor) -> Tensor:
        """The scalar to descend once `points` are found."""
        ...


@dataclass(frozen=True)
class AWP:
    """min over w of max over v of `inner`'s cost at w + v, ||v_l|| <= gamma ||w_l||: Wu et al. 2020, algorithm 1.

    `inner` finds its points at w. Then every matrix or kernel w_l takes one step up the cost at those points,
    v_l = gamma ||w_l|| g_l / ||g_l||, and the gradient at w + v is what w descends; biases stay,
    as in their code. w itself is never written to. A step costs one evaluation of `inner`'s cost, forward and
    backward, more than `inner` alone.
    """

    inner: Adversarial
    gamma: float = 0.01

    name: ClassVar[str] = "awp"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Wu et al. 2020, arXiv:2004.05884"
    whole: ClassVar[bool] = True  # the weights are moved once, by the gradient of all images

    def __post_init__(self) -> None:
        """Refuse what can be no size, and a recipe without points to hold still."""
        if not isinstance(self.inner, Adversarial):
            raise UsageError(
                f"expected a recipe that trains on points it has sought (madry, trades, mart, fast), got {self.inner}"
            )
        if not self.gamma >= 0:
            raise UsageError(f"expected gamma >= 0, got {self.gamma}")

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Tensor:
        """The inner cost at the perturbed weights; its gradient reaches the weights unchanged."""
        points = self.inner.points(net, x, y, moment)
        weights, shift = dict(net.named_parameters()), self.shift(net, x, y, points)
        moved = {name: weight + shift[name] if name in shift else weight for name, weight in weights.items()}
        return self.inner.cost(lambda images: functional_call(net, moved, (images,)), x, y, points)

    def shift(self, net: nn.Module, x: Tensor, y: Tensor, points: Tensor) -> dict[str, Tensor]:
        """What is added to each matrix or kernel, by name; zero where its gradient is."""
        weights = {name: weight for name, weight in net.named_parameters() if weight.dim() > 1}
        held = {name: buffer.clone() for name, buffer in net.named_buffers()}  # running means are counted once
        cost = self.inner.cost(lambda images: functional_call(net, held, (images,)), x, y, points)
        gradients = torch.autograd.grad(cost, list(weights.values()))
        return {
            name: self.gamma * weight.detach().norm() * _unit(gradient)
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
        }


def _unit(gradient: Tensor) -> Tensor:
    """`gradient` over its length, scaled first so that a tiny one keeps its direction."""
    scaled: Tensor = gradient / gradient.abs().amax().clamp_min(1e-38)
    length: Tensor = scaled.norm()
    return scaled / length.clamp_min(1e-12)
