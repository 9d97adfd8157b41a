"""The few functions that most users need."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from sparring import catalog
from sparring.core.attack import Attack
from sparring.core.defense import Defense
from sparring.core.judge import Judge
from sparring.core.threat import Threat
from sparring.data.images import Dataset
from sparring.defenses.standard import Standard
from sparring.engine.loop import run
from sparring.engine.outcome import Outcome
from sparring.models.checkpoint import Checkpoint
from sparring.models.wrap import wrap
from sparring.training.fit import Settings, fit


def train(
    net: str,
    data: Dataset,
    *,
    steps: int = 2000,
    defense: Defense | None = None,
    seed: int = 0,
    path: Path | str | None = None,
    **settings: Any,
) -> Checkpoint:
    """Train `net` ("dense" or "conv") on `data`; stored at `path` if one is given.

    `defense` is how to train (default: plainly); `settings` are the other fields of `Settings`, such as
    `framework="tensorflow"`, with which the result is a Keras model, stored as .keras instead of .safetensors.
    """
    chosen = Settings(net, steps, seed=seed, **settings)
    if path is not None:
        return fit(chosen, data, defense or Standard(), Path(path))
    with TemporaryDirectory() as folder:
        return fit(chosen, data, defense or Standard(), Path(folder) / net)


def attack(
    model: object,
    x: Tensor,
    y: Tensor,
    attack: Attack | str,
    threat: Threat,
    *,
    target: Tensor | None = None,
    confidence: float = 0.0,
    **options: Any,
) -> Outcome:
    """Attack images `x` (n, c, h, w) in the model's pixel range, with labels `y` (n,).

    `model` is anything that `wrap` takes, and `attack` is one, or its name with options ("pgd:steps=10"). With
    `target` (n,) the model must name that class; with `confidence` it must give what it names at least that
    probability. `options` go to `engine.loop.run`: sample, restarts, seed, eight_bit, width, on_progress.
    """
    queried = wrap(model)
    chosen = catalog.attack(attack) if isinstance(attack, str) else attack
    goals = None if target is None else torch.as_tensor(target).view(-1, 1)
    return run(queried, chosen, threat, x, y, targets=goals, judge=Judge(confidence), **options)
