"""Several attacks on the same rows, seen by the same judge."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparring.comparison.entry import Entry, median
from sparring.comparison.trial import Trial, trial
from sparring.core.attack import Attack
from sparring.core.showing import figure, percent, rounded, table
from sparring.core.threat import Threat
from sparring.engine.outcome import Outcome
from sparring.models.wrap import wrap

_POINTS = 64  # of a security curve


@dataclass(frozen=True)
class Comparison:
    """What `compare` found: an entry and an outcome for each attack, on the same rows."""

    rows: int
    threat: Threat
    entries: tuple[Entry, ...]
    outcomes: tuple[Outcome, ...] = field(repr=False)

    @classmethod
    def of(cls, trials: Iterable[Trial], threat: Threat, x: Tensor) -> Comparison:
        """The comparison of trials on images `x` (n, c, h, w)."""
        known = tuple(trials)
        entries = tuple(Entry.of(one, threat, x) for one in known)
        return cls(len(x), threat, entries, tuple(one.outcome for one in known))

    @property
    def found(self) -> Tensor:
        """(n,) bool: the rows that fell to any of the attacks."""
        return torch.stack([outcome.found for outcome in self.outcomes]).any(0)

    @property
    def robust_accuracy(self) -> float:
        """The share of the rows that held against all of them: an upper bound on the truth."""
        return 1.0 - self.found.double().mean().item()

    @property
    def distances(self) -> Tensor:
        """(attacks, n) float64: of what each found, in the norm of the threat model; 0 of a row that is wrong
        untouched, infinite where nothing was found."""
        rows = []
        for outcome in self.outcomes:
            far = torch.where(outcome.found, outcome.distance, torch.inf)
            rows.append(torch.where(outcome.clean, 0.0, far))
        return torch.stack(rows)

    @property
    def best(self) -> Tensor:
        """(n,) float64: the smallest distance that any of the attacks found for the row."""
        return self.distances.amin(0)

    @property
    def reach(self) -> float:
        """Where the curves end: the largest distance that is the best of its row; 0 if no row fell."""
        known = self.best[self.best.isfinite()]
        return known.max().item() if len(known) else 0.0

    @property
    def optimality(self) -> tuple[float | None, ...]:
        """How near each attack comes to the best of all, row by row: 1 - (A - A_best) / (A_none - A_best).

        A is the area under robust accuracy over eps, up to `reach`; A_none is that of an attack which finds nothing
        (Cina et al. 2024, AttackBench, arXiv 2404.19460, local optimality). None where no attack finds anything.
        """
        areas = self.distances.clamp_max(self.reach).mean(1)
        best = self.best.clamp_max(self.reach).mean()
        untouched = (self.best > 0).double().mean() * self.reach
        if not untouched > best:
            return tuple(None for _ in self.outcomes)
        return tuple(rounded((1 - (area - best) / (untouched - best)).item()) for area in areas)

    @property
    def front(self) -> tuple[bool, ...]:
        """Which attacks no other beats: none reaches their success at a median no farther for no more passes."""

        def cost(entry: Entry) -> tuple[float, float, float]:
            far = torch.inf if entry.median is None else entry.median
            return -(entry.success or 0.0), far, float(entry.forward + entry.backward)

        costs = [cost(entry) for entry in self.entries]
        return tuple(own[0] < 0 and not any(_beats(other, own) for other in costs) for own in costs)

    def curve(self, eps: Sequence[float]) -> list[list[float]]:
        """The security curves: of each attack, then of the best of all, the share of rows farther away than eps."""
        far = torch.cat([self.distances, self.best[None]])
        return [[rounded((row > at).double().mean().item()) or 0.0 for at in eps] for row in far]

    def figures(self) -> list[dict[str, Any]]:
        """The entries as JSON values, each with its optimality and whether it is on the front."""
        more = zip(self.entries, self.optimality, self.front, strict=True)
        return [asdict(entry) | {"optimality": share, "front": front} for entry, share, front in more]

    def summary(self) -> dict[str, Any]:
        """What is known of all attacks together, as JSON values: the best of all, and the security curves."""
        grid = [self.reach * place / (_POINTS - 1) for place in range(_POINTS if self.reach else 1)]
        *each, best = self.curve(grid)
        held = self.best[self.best > 0]
        return {
            "norm": self.threat.norm,
            "worst_case_accuracy": rounded(self.robust_accuracy),
            "best_median": median(held[held.isfinite()], len(held)),
            "curve": {"eps": [round(at, 6) for at in grid], "attacks": each, "best": best},
        }

    def _repr_html_(self) -> str:
        head = ("attack", "threat model", "success", "median", "mean Linf", "mean L2", "8-bit", "confidence")
        lines = [
            (
                entry.name,
                entry.threat,
                percent(entry.success),
                figure(entry.median),
                figure(entry.mean_linf),
                figure(entry.mean_l2),
                percent(entry.eight_bit),
                percent(entry.confidence),
                figure((entry.forward + entry.backward) / self.rows, 1),
                figure(entry.seconds, 2),
            )
            for entry in self.entries
        ]
        note = f"{percent(self.robust_accuracy)} held against all of them, an upper bound on robust accuracy."
        title = f"{len(self.entries)} attacks on the same {self.rows} images"
        return table(title, (*head, "passes/row", "seconds"), lines, note)


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Is `one` nowhere larger than `other`, and somewhere smaller?"""
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def compare(
    model: object,
    x: Tensor,
    y: Tensor,
    attacks: Sequence[Attack | str],
    threat: Threat,
    *,
    budget: int | None = None,
    tell: Callable[[str, int, int], None] = lambda *_: None,
    **options: Any,
) -> Comparison:
    """Attack images `x` (n, c, h, w) with labels `y` (n,) by each of `attacks`, an attack or "pgd:steps=10".

    With `budget` no attack spends more forward and backward passes on a row, and those given by name take as many
    steps as it pays for. `options` go to `sparring.attack`: target, confidence, seed, eight_bit, ...; `tell` hears
    the name of the attack that runs, the rows done, and of how many.
    """
    queried = wrap(model)
    trials = []
    for given in attacks:
        name = given if isinstance(given, str) else given.name
        hears = partial(tell, name)
        trials.append(trial(queried, x, y, given, threat, budget=budget, on_progress=hears, **options))
    return Comparison.of(trials, threat, x)
