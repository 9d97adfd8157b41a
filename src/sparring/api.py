"""The few functions that most users need."""

from __future__ import annotations

from collections.abc import Callable
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
from sparring.training.fit import Line, Settings, fit
from sparring.training.holdback import HoldBack


def train(
    net: str,
    data: Dataset,
    *,
    steps: int = 2000,
    defense: Defense | None = None,
    seed: int = 0,
    path: Path | str | None = None,
    hold_back: HoldBack | None = None,
    device: str = "cpu",
    devices: int = 1,
    on_line: Callable[[Line], None] | None = None,
    **settings: Any,
) -> Checkpoint:
    """Train the net called `net`, such as "dense" or "conv", on `data`; stored at `path` if one is given.

    `defense` is how to train (default: plainly); `settings` are the other fields of `Settings`, such as
    `framework="tensorflow"`, with which the result is a Keras model, stored as .keras instead of .safetensors.
    `hold_back` says which training images are attacked as it goes on, to keep the best weights and, with its
    `patience`, to end early. With `devices` so many processes on `device` share every minibatch. `on_line` is told
    each line of the log. The same call with the same `path` goes on where a training was cut short.
    """
    chosen = Settings(net, steps, seed=seed, **settings)
    with TemporaryDirectory() as folder:
        return fit(
            chosen,
            data,
            defense or Standard(),
            Path(folder) / net if path is None else Path(path),
            hold_back=hold_back,
            device=device,
            devices=devices,
            on_line=on_line,
        )


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
