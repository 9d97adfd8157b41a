"""MODEL on the command line: a checkpoint of ours, a file, a URL, or a function that returns any model."""

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
from sparring.core.model import Model
from sparring.models.checkpoint import is_checkpoint, open_checkpoint
from sparring.models.eot import EOT
from sparring.models.http import Remote
from sparring.models.torch import TorchModel
from sparring.models.wrap import wrap


@dataclass(frozen=True)
class Named:
    """A model, what it was called, and the card if it is a checkpoint of ours."""

    name: str
    model: Model
    digest: str  # SHA-256 over the weights, or over the file or the address they come from
    card: dict[str, Any]


def digest(net: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of the weights."""
    sha = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def digest_of(model: Model) -> str | None:
    """What tells this model from others: its weights where they can be seen, the address of a served one."""
    if isinstance(model, Remote):
        return repr(model)
    if isinstance(model, EOT):
        inner = digest_of(model.model)
        return None if inner is None else hashlib.sha256(f"{model!r} {inner}".encode()).hexdigest()
    return digest(model.net) if isinstance(model, TorchModel) and isinstance(model.net, nn.Module) else None


def open_model(spec: str, device: str = "cpu", **options: Any) -> Named:
    """The model that `spec` means.

    A checkpoint of ours, a `.onnx` or `.keras` file, a SavedModel, a `.json` file that describes an endpoint, the
    URL of a v2 server, or `file.py:function` or `package.module:function`, which returns a model of any kind.
    `options` go to the adapter.
    """
    if spec.startswith(("http://", "https://")):  # what follows ? may hold a key
        model = wrap(spec, **options)
        return Named(spec.partition("?")[0], model, repr(model), {})
    _, colon, function = spec.rpartition(":")
    if colon and function.isidentifier():
        model = wrap(_moved(load_object(spec), device), **options)
        return Named(spec, model, digest_of(model) or hashlib.sha256(spec.encode()).hexdigest(), {})
    path = Path(spec)
    if not path.exists():
        raise UsageError(
            f"expected a checkpoint, a .onnx or .keras file, a URL, file.py:function or package.module:function, "
            f"got {spec!r}; no such file"
        )
    foreign = path.suffix in (".onnx", ".keras", ".json") or (path / "saved_model.pb").exists()
    if foreign and not is_checkpoint(path):
        return Named(spec, wrap(path, **options), _of_files(path), {})
    checkpoint = open_checkpoint(path)
    net = checkpoint.net.to(device) if isinstance(checkpoint.net, nn.Module) else checkpoint.net
    model = wrap(net, **options)
    sha = digest_of(model) or checkpoint.card["weights_sha256"]
    return Named(str(checkpoint.path), model, sha, checkpoint.card)


def _moved(made: object, device: str) -> object:
    """What a function made, with its weights on `device` where it is plain that there are any."""
    if isinstance(made, nn.Module):
        return made.to(device)
    inner = made.model if isinstance(made, EOT) else made
    if isinstance(inner, TorchModel) and isinstance(inner.net, nn.Module):
        inner.net.to(device)  # in place
    return made


def _of_files(path: Path) -> str:
    """SHA-256 over the file, or over all files of a folder."""
    sha = hashlib.sha256()
    for part in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if part.is_file():
            sha.update(part.read_bytes())
    return sha.hexdigest()


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


def load_object(spec: str) -> object:
    """What the function or class that `spec` names gives when it is called without arguments."""
    source, _, function = spec.rpartition(":")
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
        made = getattr(module, function)()
    except Exception as error:
        raise ModelError(f"{spec}: calling {function}() failed: {type(error).__name__}: {error}") from error
    if made is None or isinstance(made, torch.Tensor | str):
        raise ModelError(f"{spec}: expected a model, got {type(made).__name__}; let {function}() return one")
    return made
