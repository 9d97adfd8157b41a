"""Any classifier as a model: each adapter beside this file says what it can take."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

import sparring.models
from sparring.core.errors import ModelError
from sparring.core.model import Model
from sparring.models.torch import TorchModel


def wrap(source: object, **options: Any) -> Model:
    """`source` as a model to be queried: the adapter is chosen by what it is.

    A torch or Keras module, a fitted scikit-learn estimator, a jitted JAX function, a path to a `.onnx` or
    `.keras` file or to a SavedModel, a URL of an Open Inference Protocol v2 server, a mapping that describes a
    JSON endpoint; any other function is taken for one of torch tensors. `options` go to the adapter: `bounds`,
    `mean` and `std` for all of them.
    """
    if hasattr(source, "query") and hasattr(source, "access"):
        if options:
            raise ModelError(f"expected no options for {type(source).__name__}, which is a model already")
        return source  # type: ignore[return-value]  # it has what a Model has
    for adapter in _adapters():
        found: Model | None = adapter.adapt(source, **options)
        if found is not None:
            return found
    if callable(source):
        return TorchModel(source, **options)
    raise ModelError(
        f"expected a torch, Keras or scikit-learn model, a function, a .onnx or .keras file, a SavedModel or a URL, "
        f"got {source if isinstance(source, str | Path) else type(source).__name__}"
    )


def _adapters() -> list[Any]:
    names = sorted(module.name for module in pkgutil.iter_modules(sparring.models.__path__))
    modules = [importlib.import_module(f"sparring.models.{name}") for name in names if name != "wrap"]
    return [module for module in modules if hasattr(module, "adapt")]
