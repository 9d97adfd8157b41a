"""Backward pass differentiable approximation: a gradient for a layer that has none, or one that misleads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparring.core.errors import ModelError, UsageError

Layer = Callable[[Tensor], object]


def bpda(layer: Layer, backward: Layer | None = None) -> nn.Module:
    """A module that computes `layer` on the way forward and differentiates `backward` on the way back.

    Athalye, Carlini and Wagner 2018, arXiv:1802.00420, sections 4.1.1 (`backward` left out: the identity, also
    called straight-through) and 4.1.2 (a differentiable function close to the layer). Both are modules or functions
    of one tensor with the same shape of result; a layer may leave torch and return an array, whole numbers or bits.

    Put it where the layer was: `nn.Sequential(bpda(jpeg), net)`, or `net.quantise = bpda(net.quantise)`. The answers
    stay those of the layer, so that no verdict changes. The layer's own parameters get no gradient.
    """
    parts: dict[str, object] = {"layer": layer} if backward is None else {"layer": layer, "backward": backward}
    for name, given in parts.items():
        if isinstance(given, type) or not callable(given):
            what = f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
            raise UsageError(f"expected {name} to be a module or a function of one tensor, got {what}")
    return _BPDA(layer, backward)


class _BPDA(nn.Module):
    def __init__(self, layer: Layer, stand_in: Layer | None) -> None:
        super().__init__()
        self.layer, self.stand_in = layer, stand_in

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():  # a layer that differentiates on its own can do so under no_grad as well
            value = _as_tensor(self.layer(x.detach().clone()), x)
        if self.stand_in is None and value.shape != x.shape:
            raise ModelError(
                f"expected a layer that keeps the shape {tuple(x.shape)}, got {tuple(value.shape)}; give a "
                f"differentiable stand-in with that result: bpda(layer, backward=...)"
            )
        if not (torch.is_grad_enabled() and x.requires_grad):
            return value
        stand_in = x if self.stand_in is None else self.stand_in(x)
        if not isinstance(stand_in, Tensor) or stand_in.shape != value.shape:
            got = tuple(stand_in.shape) if isinstance(stand_in, Tensor) else type(stand_in).__name__
            raise ModelError(f"expected backward to give {tuple(value.shape)}, as the layer does, got {got}")
        through: Tensor = _Through.apply(value, stand_in)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return through


def _as_tensor(value: object, x: Tensor) -> Tensor:
    """What the layer gave, as a tensor that the next layer takes: numbers of torch's keep their precision."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach()
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return torch.as_tensor(value).detach().to(x)
    raise ModelError(f"expected a layer that gives a tensor or an array, got {type(value).__name__}")


class _Through(torch.autograd.Function):
    """The first argument on the way forward; the gradient goes to the second."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, stand_in: Tensor) -> Tensor:
        return value.clone()  # a view could not be written to, as nn.ReLU(inplace=True) does

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]
