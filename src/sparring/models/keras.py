"""A Keras model, a SavedModel or a TensorFlow function as a model to be queried."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sparring.core.errors import ModelError, UsageError
from sparring.core.model import Access, Model, Prediction
from sparring.models.foreign import TINY, comes_from, framework
from sparring.models.jax import JaxModel
from sparring.models.tensorflow import TensorFlowModel
from sparring.models.torch import TorchModel

Call = Callable[[Any], Any]  # from images as the model wants them to what it answers
Shape = tuple[int | None, ...]
_SOFTMAX, _SIGMOID = ("softmax", "softmax_v2"), ("sigmoid",)  # tf.nn.softmax calls itself softmax_v2


class KerasModel:
    """A Keras 3 model on any backend, the path of a .keras file or of a SavedModel, or a TensorFlow function.

    Images come as (n, c, h, w) within `bounds` and are given as the model's input shape asks: channels first or last,
    without the channel, or flat; where nothing says, channels last. `mean` and `std` (one number a channel) normalise
    inside the model, so that eps stays in raw input units. A final softmax layer, or a sigmoid over one unit, is left
    out and the logits before it are used; `probabilities=True` says that there is one that cannot be found, and its
    logarithm serves; `probabilities=False` takes the output as it is. The model runs with `training=False`, and
    neither it nor its weights are changed.
    """

    access = Access.GRADIENT

    def __init__(
        self,
        model: object,
        *,
        bounds: tuple[float, float] = (0.0, 1.0),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        probabilities: bool | None = None,
    ) -> None:
        self.bounds = bounds
        self._inner = _adapter(model, probabilities, {"bounds": bounds, "mean": mean, "std": std})

    def query(self, x: Tensor, access: Access) -> Prediction:
        """Answer for images `x` (n, c, h, w)."""
        return self._inner.query(x, access)


def _adapter(model: object, probabilities: bool | None, options: dict[str, Any]) -> Model:
    keras: Any = framework("keras", "tensorflow")
    kind = "probabilities" if probabilities else "given"
    if isinstance(model, str | Path):
        path = Path(model)
        if not path.exists():
            raise UsageError(f"expected a .keras file or the folder of a SavedModel, found no {path}")
        if path.is_dir():
            return _plain(*_signature(path), kind, options)
        try:
            model = keras.models.load_model(path, compile=False)
        except Exception as error:
            raise ModelError(f"{path}: expected a Keras model ({error}); store it with model.save(...)") from error
    if not isinstance(model, keras.layers.Layer):
        if not callable(model):
            raise UsageError(f"expected a Keras model, a path or a function, got {type(model).__name__}")
        return _plain(model, None, kind, options)
    return _keras(keras, model, probabilities, options)


def _plain(call: Call, shape: Shape | None, kind: str, options: dict[str, Any]) -> Model:
    """The adapter of a TensorFlow function."""
    tf: Any = framework("tensorflow", "tensorflow")

    def logits(x: Any) -> Any:
        return _finish(tf, tf.math.log, call(_arrange(tf, x, shape)), kind)

    return TensorFlowModel(logits, **options)


def _keras(keras: Any, model: Any, probabilities: bool | None, options: dict[str, Any]) -> Model:
    """The adapter of a Keras model for the backend that Keras runs on."""
    logits, backend = stateless(keras, model, probabilities), keras.config.backend()
    if backend == "tensorflow":
        still: Call = framework("tensorflow", "tensorflow").stop_gradient
        return TensorFlowModel(lambda x: logits(x, [still(value) for value in _values(model)]), **options)
    if backend == "torch":
        return TorchModel(lambda x: logits(x, _values(model)).to(x.device), **options)
    if backend == "jax":
        return JaxModel(logits, weights=partial(_values, model), **options)
    raise UsageError(f"expected Keras on tensorflow, torch or jax, found {backend!r}; set KERAS_BACKEND")


def stateless(keras: Any, model: Any, probabilities: bool | None = None) -> Callable[[Any, list[Any]], Any]:
    """A function from images (n, c, h, w) and the values of `model.variables` to logits (n, classes)."""
    if not model.built:
        raise ModelError("expected a model with weights, got one that was never built; give it a keras.Input")
    call: Call = partial(model, training=False)
    kind = "probabilities" if probabilities else "given"
    if probabilities is not False:
        call, kind = _peel(keras, model) or (call, kind)
    shape = getattr(model, "input_shape", None)  # a subclassed model has none
    if shape is not None and not isinstance(shape, tuple):
        raise ModelError(f"expected a model with one input, got the inputs {shape}")

    def logits(x: Any, values: list[Any]) -> Any:
        images = _arrange(keras.ops, x, shape, keras.config.image_data_format() == "channels_first")
        with keras.StatelessScope(state_mapping=list(zip(model.variables, values, strict=True))):
            return _finish(keras.ops, keras.ops.log, call(images), kind)

    return logits


def _values(model: Any) -> list[Any]:
    return [variable.value for variable in model.variables]


def _peel(keras: Any, model: Any) -> tuple[Call, str] | None:
    """The model before its final softmax or sigmoid, if there is one, and which it is; the weights are shared."""
    outputs = getattr(model, "outputs", None)  # a layer or a subclassed model has none
    if not outputs or len(outputs) != 1 or len(model.inputs) != 1:
        return None
    layer, place, _ = outputs[0]._keras_history
    before = layer._inbound_nodes[place].input_tensors
    if len(before) != 1:
        return None
    if isinstance(layer, keras.Model):  # a model inside this one
        after = _peel(keras, layer)
        if after is None:
            return None
        rest: Call = after[0]
        kind: str | None = after[1]
    else:
        kind = _ending(layer, outputs[0].shape)
        if type(layer) is keras.layers.Dense:
            rest = partial(_linear, keras.ops, layer)
        elif type(layer).__name__ in ("Softmax", "Sigmoid", "Activation"):  # a layer or a bare operation
            rest = _same
        else:
            return None
    if kind is None:
        return None
    if before[0] is model.inputs[0]:
        return rest, kind
    trunk = keras.Model(model.inputs[0], before[0])
    return lambda x: rest(trunk(x, training=False)), kind


def _ending(layer: Any, shape: Shape) -> str | None:
    """What stands before the activation of `layer`, if that is a softmax, or a sigmoid over one unit."""
    activation = getattr(layer, "activation", None)
    name = type(layer).__name__.lower() if activation is None else getattr(activation, "__name__", "")
    if name in _SOFTMAX and shape[-1] != 1:
        return "given"
    return "odds" if name in _SIGMOID and shape[-1] == 1 else None


def _linear(ops: Any, layer: Any, x: Any) -> Any:
    """A dense layer without its activation."""
    product = ops.matmul(x, layer.kernel)
    return product if layer.bias is None else ops.add(product, layer.bias)


def _same(x: Any) -> Any:
    return x


def _arrange(ops: Any, x: Any, shape: Shape | None, first: bool = False) -> Any:
    """Images (n, c, h, w) as an input of `shape` (its rows left out of account) wants them."""
    _, channels, height, width = x.shape
    last = ops.transpose(x, (0, 2, 3, 1))
    if shape is None:
        return x if first else last
    forms = [((height, width, channels), last), ((channels, height, width), x)]
    for form, images in reversed(forms) if first else forms:
        if _fits(shape[1:], form):
            return images
    if channels == 1 and _fits(shape[1:], (height, width)):
        return ops.reshape(x, (-1, height, width))
    if _fits(shape[1:], (height * width * channels,)):
        return ops.reshape(last, (-1, height * width * channels))
    raise ModelError(f"expected images that fit the model's input {shape}, got {(channels, height, width)}")


def _fits(wanted: Sequence[int | None], form: Sequence[int]) -> bool:
    return len(wanted) == len(form) and all(w in (None, f) for w, f in zip(wanted, form, strict=True))


def _finish(ops: Any, log: Call, answer: Any, kind: str) -> Any:
    """What a model answered as logits (n, classes)."""
    shape = getattr(answer, "shape", None)
    if shape is None or len(shape) != 2:
        got = type(answer).__name__ if shape is None else tuple(shape)
        raise ModelError(f"expected logits (n, classes >= 2), got {got}")
    answer = ops.cast(answer, "float32")
    if kind == "odds":
        return ops.multiply(answer, np.array([[0.0, 1.0]], np.float32))
    if kind == "probabilities":
        if shape[1] == 1:
            odds = ops.multiply(answer, np.array([[-1.0, 1.0]], np.float32))
            answer = ops.add(odds, np.array([[1.0, 0.0]], np.float32))
        return log(ops.maximum(answer, TINY))
    if shape[1] == 1:
        raise ModelError(
            "expected logits (n, classes >= 2), got one number a row; if it is the probability of class 1, say so: "
            "KerasModel(..., probabilities=True)"
        )
    return answer


def _signature(path: Path) -> tuple[Call, Shape]:
    """The function that a SavedModel serves, and the shape of its input."""
    tf: Any = framework("tensorflow", "tensorflow")
    try:
        loaded = tf.saved_model.load(str(path))
    except Exception as error:
        raise ModelError(f"{path}: expected a SavedModel ({error}); store it with model.export(...)") from error
    if not loaded.signatures:
        raise ModelError(f"{path}: expected a SavedModel with a signature, found none; use model.export(...)")
    names = list(loaded.signatures)
    served = loaded.signatures["serving_default" if "serving_default" in names else names[0]]
    inputs, outputs = served.structured_input_signature[1], served.structured_outputs
    if len(inputs) != 1 or len(outputs) != 1:
        raise ModelError(f"{path}: expected one input and one output, got {list(inputs)} and {list(outputs)}")
    ((key, spec),), (result,) = inputs.items(), outputs

    def call(x: Any, _alive: object = loaded) -> Any:  # a signature does not keep the variables alive
        return served(**{key: tf.cast(x, spec.dtype)})[result]

    return call, tuple(spec.shape)


def adapt(source: object, **options: Any) -> KerasModel | None:
    """A Keras model, a TensorFlow function, a .keras file or a SavedModel; see `sparring.wrap`."""
    if isinstance(source, str | Path):
        stored = str(source).endswith(".keras") or (Path(source) / "saved_model.pb").exists()
    else:
        stored = comes_from(source, "keras", "tensorflow", "tf_keras")
    return KerasModel(source, **options) if stored else None
