"""Several attacks on the same rows, seen by the same judge."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparring import api, catalog
from sparring.core.attack import Attack
from sparring.core.showing import figure, mean, percent, rounded, table
from sparring.core.threat import L2, Linf, Threat
from sparring.engine.outcome import Outcome
from sparring.models.wrap import wrap


@dataclass(frozen=True)
class Entry:
    """One attack: success among the rows that held untouched, and means over those that fell; None of nothing."""

    name: str
    attack: str
    threat: str
    success: float | None
    mean_linf: float | None
    mean_l2: float | None
    confidence: float | None
    forward: int  # passes in all
    backward: int
    unconfirmed: int  # images that fooled the model once and, judged again, did not
    failed: int  # rows that the model could not answer for
    seconds: float

    @classmethod
    def of(cls, name: str, attack: Attack, threat: Threat, outcome: Outcome, x: Tensor, seconds: float) -> Entry:
        """The entry of an outcome on images `x` (n, c, h, w)."""
        fell = outcome.found & ~outcome.clean
        best, origin = outcome.best[fell], x.to(outcome.best.device)[fell]
        return cls(
            name=name,
            attack=repr(attack),
            threat=threat.describe(),
            success=rounded(outcome.success_rate),
            mean_linf=mean(Linf(1.0).distance(best, origin)),
            mean_l2=mean(L2(1.0).distance(best, origin)),
            confidence=mean(outcome.confidence[fell]),
            forward=int(outcome.forward.sum()),
            backward=int(outcome.backward.sum()),
            unconfirmed=int(outcome.moved.sum()),
            failed=int(outcome.failed.sum()),
            seconds=round(seconds, 3),
        )


@dataclass(frozen=True)
class Comparison:
    """What `compare` found: an entry and an outcome for each attack, on the same rows."""

    rows: int
    entries: tuple[Entry, ...]
    outcomes: tuple[Outcome, ...] = field(repr=False)

    @property
    def found(self) -> Tensor:
        """(n,) bool: the rows that fell to any of the attacks."""
        return torch.stack([outcome.found for outcome in self.outcomes]).any(0)

    @property
    def robust_accuracy(self) -> float:
        """The share of the rows that held against all of them: an upper bound on the truth."""
        return 1.0 - self.found.double().mean().item()

    def figures(self) -> list[dict[str, Any]]:
        """The entries as JSON values."""
        return [asdict(entry) for entry in self.entries]

    def _repr_html_(self) -> str:
        head = ("attack", "threat model", "success", "mean Linf", "mean L2", "confidence", "passes/row", "seconds")
        lines = [
            (
                entry.name,
                entry.threat,
                percent(entry.success),
                figure(entry.mean_linf),
                figure(entry.mean_l2),
                percent(entry.confidence),
                figure((entry.forward + entry.backward) / self.rows, 1),
                figure(entry.seconds, 2),
            )
            for entry in self.entries
        ]
        note = f"{percent(self.robust_accuracy)} held against all of them, an upper bound on robust accuracy."
        return table(f"{len(self.entries)} attacks on the same {self.rows} images", head, lines, note)


def compare(
    model: object,
    x: Tensor,
    y: Tensor,
    attacks: Sequence[Attack | str],
    threat: Threat,
    *,
    tell: Callable[[str, int, int], None] = lambda *_: None,
    **options: Any,
) -> Comparison:
    """Attack images `x` (n, c, h, w) with labels `y` (n,) by each of `attacks`, an attack or "pgd:steps=10".

    `options` go to `sparring.attack`: target, confidence, seed, eight_bit, ...; `tell` hears the name of the attack
    that runs, the rows done, and of how many.
    """
    queried = wrap(model)
    entries, outcomes = [], []
    for given in attacks:
        attack = catalog.attack(given) if isinstance(given, str) else given
        name = given if isinstance(given, str) else attack.name
        begin = time.perf_counter()
        outcomes.append(api.attack(queried, x, y, attack, threat, on_progress=partial(tell, name), **options))
        entries.append(Entry.of(name, attack, threat, outcomes[-1], x, time.perf_counter() - begin))
    return Comparison(len(x), tuple(entries), tuple(outcomes))
