"""MODEL on the command line: a checkpoint of ours, or a function that returns a module."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from sparring.core.errors import ModelError, UsageError, unknown
from sparring.models.checkpoint import open_checkpoint
from sparring.models.torch import TorchModel


@dataclass(frozen=True)
class Named:
    """A model, what it was called, and the card if it is a checkpoint of ours."""

    name: str
    model: TorchModel
    digest: str  # SHA-256 over the weights
    card: dict[str, Any]


def digest(net: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of the weights."""
    sha = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def open_model(spec: str, device: str = "cpu") -> Named:
    """The model that `spec` means: a checkpoint's path, `file.py:function` or `package.module:function`."""
    source, colon, function = spec.rpartition(":")
    if colon and function.isidentifier():
        net = _call(spec, source, function)
        return Named(spec, TorchModel(net.to(device)), digest(net), {})
    path = Path(spec)
    if not path.exists():
        raise UsageError(
            f"expected a checkpoint, file.py:function or package.module:function, got {spec!r}; no such file"
        )
    checkpoint = open_checkpoint(path)
    return Named(str(checkpoint.path), TorchModel(checkpoint.net.to(device)), digest(checkpoint.net), checkpoint.card)


def _import(spec: str, source: str) -> ModuleType:
    if source.endswith(".py"):
        path = Path(source)
        if not path.is_file():
            raise UsageError(f"{spec}: no file {source}")
        found = importlib.util.spec_from_file_location(path.stem, path)
        if found is None or found.loader is None:
            raise UsageError(f"{spec}: {source} is no Python file")
        module = importlib.util.module_from_spec(found)
        sys.modules.setdefault(path.stem, module)
        found.loader.exec_module(module)
        return module
    if "" not in sys.path:
        sys.path.insert(0, "")
    return importlib.import_module(source)


def _call(spec: str, source: str, function: str) -> nn.Module:
    try:
        module = _import(spec, source)
    except ModuleNotFoundError as error:
        raise UsageError(f"{spec}: {error}") from error
    except UsageError:
        raise
    except Exception as error:
        raise ModelError(f"{spec}: importing {source} failed: {type(error).__name__}: {error}") from error
    if not hasattr(module, function):
        raise unknown(f"function in {source}", function, [n for n in vars(module) if not n.startswith("_")])
    try:
        net = getattr(module, function)()
    except Exception as error:
        raise ModelError(f"{spec}: calling {function}() failed: {type(error).__name__}: {error}") from error
    if not isinstance(net, nn.Module):
        raise ModelError(f"{spec}: expected a torch.nn.Module, got {type(net).__name__}")
    return net
