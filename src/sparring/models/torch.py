"""A PyTorch module as a model to be queried."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparring.core.errors import ModelError
from sparring.core.model import Access, Prediction

_NORMS, _DROPOUTS = nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd


class TorchModel:
    """A module from images (n, c, h, w) within `bounds` to logits (n, classes).

    `mean` and `std` (one number a channel) normalise inside the model, so that eps stays in raw input units.
    `probabilities` says that the module ends in a softmax; its logarithm then serves as logits. `dropout` says that
    dropout is on by intent, as part of a defense (`EOT`). The module's mode, its parameters and their gradients are
    left as they are.
    """

    access = Access.GRADIENT

    def __init__(
        self,
        net: Callable[[Tensor], object],
        *,
        bounds: tuple[float, float] = (0.0, 1.0),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        probabilities: bool = False,
        dropout: bool = False,
    ) -> None:
        self.net, self.bounds, self._probabilities = net, bounds, probabilities
        if isinstance(net, nn.Module):
            for name, module in net.named_modules():
                if module.training and isinstance(module, _NORMS if dropout else (_NORMS, _DROPOUTS)):
                    meant = "" if isinstance(module, _NORMS) else ", or EOT(net, n) if a defense leaves it on"
                    raise ModelError(
                        f"expected a model in eval mode, got {type(module).__name__} {name!r} in train mode; "
                        f"call net.eval(){meant}"
                    )
        self._mean = None if mean is None else torch.tensor(mean).view(-1, 1, 1)
        self._std = None if std is None else torch.tensor(std).view(-1, 1, 1)

    def _logits(self, x: Tensor) -> Tensor:
        inputs = x
        if self._mean is not None:
            inputs = inputs - self._mean.to(x.device)
        if self._std is not None:
            inputs = inputs / self._std.to(x.device)
        try:
            logits = self.net(inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if "can't allocate memory" in str(error):
                raise
            raise ModelError(f"the model failed on images {tuple(x.shape)}: {error}") from error
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x) or logits.shape[1] < 2:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ModelError(f"expected logits ({len(x)}, classes >= 2) for images {tuple(x.shape)}, got {got}")
        return logits.clamp_min(1e-38).log() if self._probabilities else logits

    def query(self, x: Tensor, access: Access) -> Prediction:
        """Answer for images `x` (n, c, h, w)."""
        if access < Access.GRADIENT:
            with torch.no_grad():
                logits = self._logits(x.clone())  # a model may write to its input
            return Prediction(logits.argmax(1), logits.float() if access >= Access.SCORE else None)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            logits = self._logits(leaf.clone())
        if not logits.requires_grad:
            raise ModelError(
                "expected logits that depend on the image, got a constant; is the model run under no_grad?"
            )
        values = logits.detach()
        return Prediction(values.argmax(1), values.float(), partial(_pull_back, logits, leaf))


def _pull_back(logits: Tensor, leaf: Tensor, cotangent: Tensor, *, keep: bool = False) -> Tensor:
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        logits, leaf, cotangent.to(logits.dtype), retain_graph=keep, allow_unused=True
    )
    gradient = found[0]
    return torch.zeros_like(leaf) if gradient is None else gradient  # None: the logits hang on the weights alone


def adapt(source: object, **options: Any) -> TorchModel | None:
    """A torch module; see `sparring.wrap`."""
    return TorchModel(source, **options) if isinstance(source, nn.Module) else None
