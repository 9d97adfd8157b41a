"""One attack on the rows of a comparison, and what it left, in a form that can be stored."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from sparring import catalog
from sparring.comparison.budget import fitted
from sparring.core import noise
from sparring.core.attack import Attack
from sparring.core.batch import Batch
from sparring.core.judge import Judge
from sparring.core.model import Model, fresh
from sparring.core.threat import Threat
from sparring.engine import width as widths
from sparring.engine.loop import run
from sparring.engine.outcome import Outcome
from sparring.engine.replay import replay


@dataclass(frozen=True)
class Trial:
    """What one attack did to the rows."""

    name: str
    attack: Attack
    outcome: Outcome
    survives: Tensor  # (n,) bool: found, and the image still fools the model when an 8-bit file has held it
    seconds: float

    def tensors(self) -> dict[str, Tensor]:
        """All that was measured, to be stored."""
        held = {field.name: getattr(self.outcome, field.name) for field in fields(self.outcome)}
        return held | {"survives": self.survives, "seconds": torch.tensor(self.seconds, dtype=torch.float64)}

    @classmethod
    def of(cls, name: str, attack: Attack, stored: Mapping[str, Tensor]) -> Trial:
        """The trial of which `tensors` were stored."""
        outcome = Outcome(**{field.name: stored[field.name] for field in fields(Outcome)})
        return cls(name, attack, outcome, stored["survives"], float(stored["seconds"]))


def chosen(given: Attack | str, threat: Threat, budget: int | None = None) -> tuple[str, Attack]:
    """The name and the attack that `given` stands for; with `budget`, with as many steps as it pays for.

    Steps that somebody chose (in `name:steps=10`, or in an attack that is no name) stay as they are.
    """
    if not isinstance(given, str):
        return given.name, given
    attack = catalog.attack(given)
    free = budget is not None and "steps" not in catalog.parse(given)[1]
    return given, fitted(attack, threat.norm, budget) if free and budget is not None else attack


def trial(
    model: Model,
    x: Tensor,
    y: Tensor,
    given: Attack | str,
    threat: Threat,
    *,
    budget: int | None = None,
    target: Tensor | None = None,
    confidence: float = 0.0,
    width: int | None = None,
    **options: Any,
) -> Trial:
    """Attack images `x` (n, c, h, w) with labels `y` (n,); `budget` is in forward and backward passes a row."""
    name, attack = chosen(given, threat, budget)
    judge = Judge(confidence)
    goals = None if target is None else torch.as_tensor(target).view(-1, 1)
    begin = time.perf_counter()
    outcome = run(model, attack, threat, x, y, targets=goals, judge=judge, width=width, budget=budget, **options)
    seconds = time.perf_counter() - begin
    return Trial(name, attack, outcome, _surviving(model, judge, threat, x, y, goals, outcome, width), seconds)


def _surviving(
    model: Model,
    judge: Judge,
    threat: Threat,
    x: Tensor,
    y: Tensor,
    goals: Tensor | None,
    outcome: Outcome,
    width: int | None,
) -> Tensor:
    """(n,) bool: the found images that still fool the model, rounded to 256 levels."""
    survives = torch.zeros_like(outcome.found)
    at = outcome.found.nonzero().squeeze(1)
    if len(at):
        goal = torch.full_like(y, -1) if goals is None else goals[:, 0]
        rows = Batch(x, y, goal, noise.keys(0, outcome.sample, torch.zeros_like(y)), threat).take(at)
        stored = threat.quantise(outcome.best[at], x[at])
        survives[at] = replay(fresh(model), judge, rows, stored, width or widths.automatic(x[0])).hit
    return survives
