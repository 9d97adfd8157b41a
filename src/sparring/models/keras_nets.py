"""Our nets in Keras, and a Keras model as a torch module, so that every recipe for training serves both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparring.core.errors import ModelError, UsageError
from sparring.models.foreign import answering, framework
from sparring.models.keras import stateless
from sparring.models.nets import Contrast
from sparring.models.tensorflow import Border


def convert(net: nn.Sequential, shape: Sequence[int]) -> Any:
    """`net`, which takes images of `shape` (c, h, w), as a Keras model of images (h, w, c) with the same weights."""
    keras: Any = framework("keras", "tensorflow")
    channels, height, width = shape
    model = keras.Sequential([keras.Input((height, width, channels))])
    flat: tuple[int, int, int] | None = None  # (h, w, c) of what was flattened last
    for layer in net:
        if isinstance(layer, nn.Flatten):
            flat = model.layers[-1].output.shape[1:] if model.layers else (height, width, channels)
            model.add(keras.layers.Flatten())
        elif isinstance(layer, nn.ReLU):
            model.add(keras.layers.ReLU())
        elif isinstance(layer, nn.Linear):
            weight = layer.weight.detach()
            if flat:  # torch flattened channels first
                weight = weight.view(-1, flat[2], *flat[:2]).permute(0, 2, 3, 1).flatten(1)
                flat = None
            model.add(keras.layers.Dense(layer.out_features, use_bias=layer.bias is not None))
            _fill(model.layers[-1], weight.T, layer.bias)
        elif isinstance(layer, nn.Conv2d):
            model.add(keras.layers.ZeroPadding2D(layer.padding))
            size, stride, bias = layer.kernel_size, layer.stride, layer.bias is not None
            model.add(keras.layers.Conv2D(layer.out_channels, size, strides=stride, use_bias=bias))
            _fill(model.layers[-1], layer.weight.permute(2, 3, 1, 0), layer.bias)
        elif isinstance(layer, Contrast):
            model.add(_contrast(keras, layer, (height, width, channels)))
        else:
            raise ModelError(f"expected Contrast, Linear, Conv2d, ReLU and Flatten, got {type(layer).__name__}")
    return model


def _contrast(keras: Any, layer: Contrast, shape: Sequence[int]) -> Any:
    """`layer` on images of `shape` (h, w, c), in layers that Keras can store."""
    images = keras.Input(shape)
    factor = 1 / (layer.high - layer.low)
    clipped = keras.layers.ReLU(max_value=1.0)(keras.layers.Rescaling(factor, -layer.low * factor)(images))
    shares = (clipped, 1 - layer.leak), (images, layer.leak)
    return keras.Model(images, keras.layers.Add()([keras.layers.Rescaling(share)(part) for part, share in shares]))


def _fill(layer: Any, *weights: Tensor | None) -> None:
    layer.set_weights([weight.detach().numpy() for weight in weights if weight is not None])


class KerasModule(nn.Module):
    """A Keras model of images of `shape` (c, h, w) as a torch module: TensorFlow computes it and its gradients.

    Its weights are torch parameters, so that any loss of its logits and any optimiser of torch trains it; `finish`
    writes them into the Keras model. Images and weights each have a way back of their own, which runs only if asked.
    """

    def __init__(self, model: Any, shape: Sequence[int]) -> None:
        super().__init__()
        keras: Any = framework("keras", "tensorflow")
        if keras.config.backend() != "tensorflow":
            raise UsageError(f"expected Keras on tensorflow, found {keras.config.backend()}; set KERAS_BACKEND")
        self.model, self._border = model, Border()
        self.weights = nn.ParameterList(torch.tensor(v.numpy()) for v in model.trainable_variables)
        tf, logits = self._border.tf, stateless(keras, model)
        self.versions = {"keras": keras.__version__, "tensorflow": tf.__version__}
        order = [next(i for i, v in enumerate(model.variables) if v is w) for w in model.trainable_variables]

        def forward(x: Any, *weights: Any) -> Any:
            values = [variable.value for variable in model.variables]
            for place, weight in zip(order, weights, strict=True):
                values[place] = weight
            return logits(x, values)

        def back(sources: Callable[[Sequence[Any]], Sequence[Any]], cotangent: Any, *inputs: Any) -> Any:
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(sources(inputs))
                answer = forward(*inputs)
            return tape.gradient(answer, sources(inputs), cotangent, unconnected_gradients="zero")

        def traced(function: Callable[..., Any], signature: Sequence[Any]) -> Any:
            return tf.function(function, input_signature=signature, autograph=False)

        taken = [tf.TensorSpec((None, *shape)), *(tf.TensorSpec(w.shape) for w in self.weights)]
        self._forward = traced(forward, taken)
        back_taken = [tf.TensorSpec((None, None)), *taken]
        self._to_images = traced(partial(back, lambda inputs: inputs[:1]), back_taken)
        self._to_weights = traced(partial(back, lambda inputs: inputs[1:]), back_taken)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes) of images `x` (n, c, h, w)."""
        inputs = [self._border.give(part) for part in (x, *self.weights)]

        def pull(back: Any, cotangent: Tensor) -> list[Tensor]:
            with answering(x):
                found = back(self._border.give(cotangent), *inputs)
                return [self._border.take(part, x) for part in found]

        with answering(x):
            logits = self._border.take(self._forward(*inputs), x)
        to_images, to_weights = partial(pull, self._to_images), partial(pull, self._to_weights)
        return logits + _way(to_images, logits, x) + _way(to_weights, logits, *self.weights)

    def finish(self) -> Any:
        """The Keras model, with the weights of now."""
        for variable, weight in zip(self.model.trainable_variables, self.weights, strict=True):
            variable.assign(weight.detach().cpu().numpy())
        return self.model


def _way(pull: Any, logits: Tensor, *inputs: Tensor) -> Tensor:
    zeros: Tensor = _Way.apply(pull, logits, *inputs)  # type: ignore[no-untyped-call]  # torch
    return zeros


class _Way(torch.autograd.Function):
    """Zeros like the logits, through which autograd reaches `inputs` by `pull`."""

    @staticmethod
    def forward(ctx: Any, pull: Any, logits: Tensor, *inputs: Tensor) -> Tensor:
        ctx.pull = pull
        return torch.zeros_like(logits)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.pull(cotangent)
