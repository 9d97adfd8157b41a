"""A trained network on disk: weights as safetensors, and a JSON card that says what they are."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from sparring.core.errors import DataError, UsageError
from sparring.core.files import write_atomic
from sparring.models.nets import build


@dataclass(frozen=True)
class Checkpoint:
    """A network of ours with its card; `path` is the weights file."""

    path: Path
    net: nn.Module
    card: dict[str, Any]


def store(path: Path, net: nn.Module, card: dict[str, Any]) -> Checkpoint:
    """Write `path` (weights) and `path` with .json (card); the card names the digest of the weights."""
    weights = save({name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()})
    card = {**card, "weights_sha256": hashlib.sha256(weights).hexdigest()}
    write_atomic(path, weights)
    write_atomic(path.with_suffix(".json"), (json.dumps(card, indent=2) + "\n").encode())
    return Checkpoint(path, net, card)


def find(path: Path) -> Path:
    """The weights file that `path` means: itself, its card's, or the only one in that folder."""
    if path.is_dir():
        cards = [
            p
            for p in sorted(path.rglob("*.safetensors"))
            if p.with_suffix(".json").is_file() and p.parent.name != "evidence"
        ]
        if len(cards) != 1:
            names = ", ".join(p.name for p in cards) or "none"
            raise UsageError(f"expected one checkpoint in {path}, found {names}; name the .safetensors file")
        return cards[0]
    return path.with_suffix(".safetensors") if path.suffix == ".json" else path


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
    try:
        net.load_state_dict(load(weights))
    except (SafetensorError, RuntimeError) as error:
        raise DataError(f"{path}: these weights do not fit {card['net']} ({error})") from error
    return Checkpoint(path, net.eval(), card)
