"""A JAX function as a model to be queried."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from sparring.core.errors import ModelError
from sparring.core.model import Access, Prediction
from sparring.models.foreign import TINY, answering, comes_from, framework, per_channel, shareable


class JaxModel:
    """A function from images (n, c, h, w) within `bounds` to logits (n, classes): Flax, Equinox or plain JAX.

    `function` must be one that `jax.jit` takes; it is compiled once for each batch shape. With `channels_last` it
    gets (n, h, w, c). `mean` and `std` (one number a channel) normalise inside the model, so that eps stays in raw
    input units. `probabilities` says that it ends in a softmax; its logarithm then serves as logits. Weights that
    `function` closes over are compiled in, so make a new JaxModel after training on; or give `weights`: it is called
    at every query, and what it returns (any pytree) is handed to `function` as its second argument.
    """

    access = Access.GRADIENT

    def __init__(
        self,
        function: Callable[..., object],
        *,
        bounds: tuple[float, float] = (0.0, 1.0),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        probabilities: bool = False,
        channels_last: bool = False,
        weights: Callable[[], object] | None = None,
    ) -> None:
        self.function, self.bounds = function, bounds
        self._probabilities, self._channels_last, self._weights = probabilities, channels_last, weights
        self._mean, self._std = per_channel(mean), per_channel(std)
        self._jax: Any = framework("jax", "jax")
        self._forward = self._jax.jit(self._logits)
        self._remembering = self._jax.jit(self._forward_and_pull)
        self._backward = self._jax.jit(_pull)

    def _logits(self, x: Any, weights: object) -> Any:
        """Traced: images (n, c, h, w) to logits (n, classes) float32."""
        jnp, shape = self._jax.numpy, x.shape
        if self._mean is not None:
            x = x - self._mean
        if self._std is not None:
            x = x / self._std
        if self._channels_last:
            x = x.transpose(0, 2, 3, 1)
        logits: Any = self.function(x) if self._weights is None else self.function(x, weights)
        if (
            not isinstance(logits, self._jax.Array)
            or logits.ndim != 2
            or len(logits) != shape[0]
            or logits.shape[1] < 2
        ):
            got = logits.shape if isinstance(logits, self._jax.Array) else type(logits).__name__
            raise ModelError(f"expected logits ({shape[0]}, classes >= 2) for images {shape}, got {got}")
        logits = logits.astype(jnp.float32)
        return jnp.log(jnp.maximum(logits, TINY)) if self._probabilities else logits

    def _forward_and_pull(self, x: Any, weights: object) -> Any:
        """Traced: the logits, and the pullback with all that it needs from the forward pass."""
        return self._jax.vjp(lambda images: self._logits(images, weights), x)

    def query(self, x: Tensor, access: Access) -> Prediction:
        """Answer for images `x` (n, c, h, w)."""
        with answering(x):
            images = self._give(x)
            weights = None if self._weights is None else self._weights()
            if access < Access.GRADIENT:
                logits = self._take(self._forward(images, weights), x)
                return Prediction(logits.argmax(1), logits if access >= Access.SCORE else None)
            values, pull = self._remembering(images, weights)
            logits = self._take(values, x)
        return Prediction(logits.argmax(1), logits, partial(self._pull_back, x, pull))

    def _pull_back(self, x: Tensor, pull: Any, cotangent: Tensor, *, keep: bool = False) -> Tensor:
        with answering(x):
            return self._take(self._backward(pull, self._give(cotangent)), x).to(x.dtype)

    def _shares(self, x: Tensor) -> bool:
        """Does `x` lie where JAX computes?"""
        return bool(self._jax.default_backend() == ("gpu" if x.is_cuda else x.device.type))

    def _give(self, x: Tensor) -> Any:
        if self._shares(x):
            return self._jax.dlpack.from_dlpack(shareable(x))
        return self._jax.numpy.asarray(x.detach().float().cpu().numpy())

    def _take(self, array: Any, x: Tensor) -> Tensor:
        """`array` as a tensor where `x` is."""
        if self._shares(x):
            return from_dlpack(array.block_until_ready())
        return torch.from_numpy(np.array(array)).to(x.device)


def _pull(pull: Any, cotangent: Any) -> Any:
    return pull(cotangent)[0]


def adapt(source: object, **options: Any) -> JaxModel | None:
    """A function that went through `jax.jit`; see `sparring.wrap`. Others: `JaxModel(function)`."""
    return JaxModel(source, **options) if callable(source) and comes_from(source, "jax", "jaxlib") else None
