"""A TensorFlow function as a model to be queried."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from sparring.core.errors import ModelError
from sparring.core.model import Access, Prediction
from sparring.models.foreign import answering, framework, per_channel, shareable


class Border:
    """Where arrays pass between torch and TensorFlow: in place if both compute on the same device."""

    def __init__(self) -> None:
        self.tf: Any = framework("tensorflow", "tensorflow")
        self._on_gpu = bool(self.tf.config.list_physical_devices("GPU"))

    def give(self, x: Tensor) -> Any:
        """`x` as TensorFlow reads it."""
        if x.is_cuda == self._on_gpu:
            return self.tf.experimental.dlpack.from_dlpack(shareable(x).__dlpack__())
        return self.tf.constant(x.detach().float().cpu().numpy())

    def take(self, array: Any, x: Tensor) -> Tensor:
        """`array` as a tensor where `x` is."""
        if x.is_cuda == self._on_gpu:
            return from_dlpack(self.tf.experimental.dlpack.to_dlpack(array))
        return torch.from_numpy(np.array(array)).to(x.device)


class TensorFlowModel:
    """A TensorFlow function from images (n, c, h, w) to logits, traced once for each size of image.

    What `function` reads through `tf.stop_gradient` costs nothing on the way back.
    """

    access = Access.GRADIENT

    def __init__(
        self,
        function: Callable[[Any], Any],
        bounds: tuple[float, float],
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
    ) -> None:
        self.function, self.bounds = function, bounds
        self._mean, self._std = per_channel(mean), per_channel(std)
        self._border = Border()
        self._traced: dict[tuple[int, ...], Any] = {}

    def _logits(self, x: Any) -> Any:
        """Traced: images (n, c, h, w) to logits (n, classes) float32."""
        if self._mean is not None:
            x = x - self._mean
        if self._std is not None:
            x = x / self._std
        return self.function(x)

    def _trace(self, size: tuple[int, ...]) -> Any:
        """The function of images of `size` (c, h, w), for any number of rows."""
        if size not in self._traced:
            tf = self._border.tf
            images = [tf.TensorSpec((None, *size), tf.float32)]
            self._traced[size] = tf.function(self._logits, input_signature=images, autograph=False)
        return self._traced[size]

    def query(self, x: Tensor, access: Access) -> Prediction:
        """Answer for images `x` (n, c, h, w)."""
        with answering(x):
            images, forward = self._border.give(x), self._trace(tuple(x.shape[1:]))
            if access < Access.GRADIENT:
                logits = _checked(self._border.take(forward(images), x), x)
                return Prediction(logits.argmax(1), logits if access >= Access.SCORE else None)
            tape = _Tape(self._border.tf, forward, images)
            logits = _checked(self._border.take(tape.answer, x), x)

        def pull_back(cotangent: Tensor, *, keep: bool = False) -> Tensor:
            with answering(x):
                return self._border.take(tape.back(self._border.give(cotangent)), x).to(x.dtype)

        return Prediction(logits.argmax(1), logits, pull_back)


class _Tape:
    """The way back from `forward(images)`.

    A tape that serves once costs a third less on the way there than one that serves often, so a second call on the
    same answer records anew.
    """

    def __init__(self, tf: Any, forward: Callable[[Any], Any], images: Any) -> None:
        self._tf, self._forward, self._images = tf, forward, images
        self._calls = 0
        self._record(often=False)

    def _record(self, *, often: bool) -> None:
        with self._tf.GradientTape(persistent=often, watch_accessed_variables=False) as self._tape:
            self._tape.watch(self._images)
            self.answer = self._forward(self._images)

    def back(self, cotangent: Any) -> Any:
        """The vector-Jacobian product."""
        self._calls += 1
        if self._calls == 2:
            self._record(often=True)
        return self._tape.gradient(self.answer, self._images, cotangent, unconnected_gradients="zero")


def _checked(logits: Tensor, x: Tensor) -> Tensor:
    if len(logits) != len(x) or logits.shape[1] < 2:
        got = tuple(logits.shape)
        raise ModelError(f"expected logits ({len(x)}, classes >= 2) for images {tuple(x.shape)}, got {got}")
    return logits
