"""A trained network on disk: its weights, and beside them a JSON card that says what they are."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from sparring.core.errors import DataError, UsageError
from sparring.core.files import write_atomic
from sparring.core.showing import percent, table
from sparring.models.foreign import framework
from sparring.models.nets import build

SUFFIXES = {"torch": ".safetensors", "tensorflow": ".keras"}  # of the weights, by framework


@dataclass(frozen=True)
class Checkpoint:
    """A network of ours with its card; `path` is the weights file, `net` a torch module or a Keras model."""

    path: Path
    net: Any
    card: dict[str, Any]

    def _repr_html_(self) -> str:
        card = self.card
        lines = [
            ("accuracy", percent(card["accuracy"])),
            ("trained on", f"{card['data']}, {card['steps']:,} steps, seed {card['seed']}"),
            ("recipe", card["plan"]["recipe"]["options"]),
            ("weights", f"{card['parameters']:,}, computed by {card['framework']}"),
            ("file", self.path),
        ]
        return table(f"{card['net']}, images {tuple(card['shape'])}", ("", ""), lines)


def store(path: Path, net: Any, card: dict[str, Any]) -> Checkpoint:
    """Write `path` (weights) and `path` with .json (card); the card names the digest of the weights."""
    weights = _bytes(net)
    card = {**card, "weights_sha256": hashlib.sha256(weights).hexdigest()}
    write_atomic(path, weights)
    write_atomic(path.with_suffix(".json"), (json.dumps(card, indent=2) + "\n").encode())
    return Checkpoint(path, net, card)


def _bytes(net: Any) -> bytes:
    """The weights as a file holds them."""
    if isinstance(net, nn.Module):
        return save({name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()})
    with TemporaryDirectory() as folder:  # Keras writes to a path only
        path = Path(folder) / "net.keras"
        net.save(path)
        return path.read_bytes()


def is_checkpoint(path: Path) -> bool:
    """Is there a card of ours beside the weights at `path`, or at `path`?"""
    try:
        return "weights_sha256" in json.loads(path.with_suffix(".json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def find(path: Path) -> Path:
    """The weights file that `path` means: itself, its card's, or the only one in that folder."""
    if path.is_dir():
        found = [p for p in sorted(path.rglob("*.json")) if is_checkpoint(p)]
        if len(found) != 1:
            names = ", ".join(find(p).name for p in found) or "none"
            raise UsageError(f"expected one checkpoint in {path}, found {names}; name the file of weights")
        return find(found[0])
    if path.suffix != ".json":
        return path
    beside = [path.with_suffix(suffix) for suffix in SUFFIXES.values()]
    return next((weights for weights in beside if weights.is_file()), beside[0])


def open_checkpoint(path: Path) -> Checkpoint:
    """The network stored at `path`, in eval mode; `DataError` when a file is missing or not what its card says."""
    path = find(path)
    beside = path.with_suffix(".json")
    for file in (path, beside):
        if not file.is_file():
            raise DataError(f"expected a checkpoint (weights and card), found no {file}")
    try:
        card: dict[str, Any] = json.loads(beside.read_text())
        net = build(card["net"], card["shape"], card["classes"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{beside}: not a card of ours ({error}); train again") from error
    weights = path.read_bytes()
    found = hashlib.sha256(weights).hexdigest()
    if found != card.get("weights_sha256"):
        raise DataError(
            f"{path}: expected sha256 {card.get('weights_sha256')}, found {found}; the file was cut or changed"
        )
    if path.suffix == SUFFIXES["tensorflow"]:
        keras: Any = framework("keras", "tensorflow")
        return Checkpoint(path, keras.models.load_model(path, compile=False), card)
    try:
        net.load_state_dict(load(weights))
    except (SafetensorError, RuntimeError) as error:
        raise DataError(f"{path}: these weights do not fit {card['net']} ({error})") from error
    return Checkpoint(path, net.eval(), card)
