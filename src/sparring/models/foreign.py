"""What the adapters of other frameworks share."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparring.core.errors import ModelError, SparringError, UsageError
from sparring.engine.process import yield_cores

TINY = float(np.finfo(np.float32).tiny)  # XLA and TensorFlow flush what is smaller to 0, which has no logarithm
_ALIGNED = 64  # bytes: what both frameworks expect of memory that they did not allocate


def framework(name: str, extra: str) -> ModuleType:
    """The package called `name`; `UsageError` with the line that installs it where there is none."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow on its own build is no news
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"expected {name} to be installed ({error}); pip install 'sparring[{extra}]'") from error


@contextmanager
def answering(x: Tensor) -> Iterator[None]:
    """Leave the cores to a framework that answers for images `x`, and turn what it raises into our errors."""
    yield_cores()
    try:
        yield
    except (SparringError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # Too little memory is said as torch says it.
        if "RESOURCE_EXHAUSTED" in str(error) or type(error).__name__ == "ResourceExhaustedError":
            raise torch.OutOfMemoryError(str(error)) from error
        raise ModelError(f"the model failed on images {tuple(x.shape)}: {error}") from error


def shareable(x: Tensor) -> Tensor:
    """`x` as another framework can read it in place: float32, contiguous, aligned, without a graph."""
    plain = x.detach().float().contiguous()
    return plain.clone() if plain.data_ptr() % _ALIGNED else plain


def per_channel(numbers: Sequence[float] | None) -> np.ndarray[Any, Any] | None:
    """One number a channel as (c, 1, 1)."""
    return None if numbers is None else np.asarray(numbers, np.float32).reshape(-1, 1, 1)


def comes_from(source: object, *packages: str) -> bool:
    """Is a class of this object from one of these? It tells the framework without loading it."""
    return any(kind.__module__.partition(".")[0] in packages for kind in type(source).__mro__)
