"""Transfer attacks: images crafted on surrogates at hand, judged on a target that no attack ever sees."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparring import catalog
from sparring.core import noise
from sparring.core.attack import Attack
from sparring.core.batch import Batch
from sparring.core.errors import DataError, ModelError
from sparring.core.judge import Judge
from sparring.core.model import Access, Model, Prediction
from sparring.core.showing import figure, mean, percent, table
from sparring.core.threat import L2, Linf, Threat
from sparring.engine import preflight
from sparring.engine import width as widths
from sparring.engine.loop import run
from sparring.engine.outcome import Outcome
from sparring.engine.replay import Judged, replay
from sparring.models.ensemble import Ensemble
from sparring.models.wrap import wrap

FAMILY = ("bim", "pgd", "mifgsm", "nifgsm", "difgsm", "tifgsm", "sifgsm", "vmifgsm")


@dataclass(frozen=True)
class Never(Judge):
    """Accepts no point: every row goes on to the attack's last one, which travels better than its first success."""

    def fooled(self, batch: Batch, prediction: Prediction) -> Tensor:
        """(n,) bool: none."""
        return torch.zeros_like(batch.targeted)


@dataclass(frozen=True)
class Carried:
    """One attack, over the rows that hold on the target when untouched; None where there is nothing to average."""

    name: str
    attack: str
    threat: str
    surrogate: float | None  # share of the rows whose point fools the surrogates (all together)
    target: float | None  # share of the rows whose point fools the target
    mean_linf: float | None  # over the points that fool the target
    mean_l2: float | None
    confidence: float | None  # of the target in its wrong answer
    forward: int  # passes through the surrogates in all
    backward: int
    queries: int  # points that the target was asked about: one a row
    failed: int  # rows that the surrogates or the target could not answer for
    seconds: float


@dataclass(frozen=True)
class Transfer:
    """What `transfer` found: an entry for each attack, and an outcome on the target with its points for all rows."""

    rows: int
    held: int  # rows that hold on the target when untouched: it names them right, or not as the goal
    entries: tuple[Carried, ...]
    outcomes: tuple[Outcome, ...] = field(repr=False)

    @property
    def found(self) -> Tensor:
        """(n,) bool: the rows that the target gets wrong, untouched or after any of the attacks."""
        return torch.stack([outcome.found for outcome in self.outcomes]).any(0)

    @property
    def robust_accuracy(self) -> float:
        """The share of the rows that held against all of them: an upper bound on the truth."""
        return 1.0 - self.found.double().mean().item()

    def figures(self) -> list[dict[str, Any]]:
        """The entries as JSON values."""
        return [asdict(entry) for entry in self.entries]

    def _repr_html_(self) -> str:
        head = ("attack", "threat model", "on surrogate", "on target", "mean Linf", "mean L2", "confidence")
        lines = [
            (
                entry.name,
                entry.threat,
                percent(entry.surrogate),
                percent(entry.target),
                figure(entry.mean_linf),
                figure(entry.mean_l2),
                percent(entry.confidence),
                figure((entry.forward + entry.backward) / self.held, 1),
                figure(entry.seconds, 2),
            )
            for entry in self.entries
        ]
        note = f"Success is among the {self.held} of {self.rows} images that hold on the target when untouched."
        return table(f"{len(self.entries)} attacks carried over", (*head, "passes/row", "seconds"), lines, note)


def transfer(
    surrogates: object,
    target: object,
    x: Tensor,
    y: Tensor,
    attacks: Sequence[Attack | str],
    threat: Threat,
    *,
    goal: Tensor | None = None,
    sample: Tensor | None = None,
    seed: int = 0,
    eight_bit: bool = False,
    width: int | None = None,
    tell: Callable[[str, int, int], None] = lambda *_: None,
) -> Transfer:
    """Attack `surrogates`, and ask `target` about the images (Papernot, McDaniel, Goodfellow 2016, arXiv:1605.07277).

    `surrogates` is what `wrap` takes, or a list of such, fused as an `Ensemble`; `attacks` run on them to their last
    step, on those of images `x` (n, c, h, w) with labels `y` (n,) that hold on the target untouched. Of an
    attack that looks for the nearest image, the nearest that fools the surrogates is carried over. The target may
    give labels only; it is asked once about every untouched image, and once a row and attack. `goal` (n,) are classes
    that both must name; `sample`, `seed`, `eight_bit` and `width` are those of `sparring.attack`.
    """
    crafted_on, judged_on = _models(surrogates, target)
    _check(crafted_on, judged_on, x, y, goal)
    sample = torch.arange(len(x), device=x.device) if sample is None else sample
    aim = torch.full_like(y, -1) if goal is None else goal
    every = Batch(x, y, aim, noise.keys(seed, sample, torch.zeros_like(sample)), threat)
    padded = width or widths.automatic(x[0])
    untouched = replay(judged_on, Judge(), every, x, padded)
    held = (~untouched.hit & ~_failed(untouched)).nonzero().squeeze(1)
    if not len(held):
        raise DataError(
            f"expected images that hold on the target untouched, got none of {len(x)}; do the labels fit?"
        )
    rows = every.take(held)
    goals = None if goal is None else rows.target[:, None]
    how: dict[str, Any] = {"sample": sample[held], "targets": goals, "seed": seed, "eight_bit": eight_bit}
    entries, outcomes = [], []
    for given in attacks:
        attack = catalog.attack(given) if isinstance(given, str) else given
        name = given if isinstance(given, str) else attack.name
        how |= {"judge": Judge() if attack.minimizes else Never(), "on_progress": partial(tell, name)}
        begin = time.perf_counter()
        made = run(crafted_on, attack, threat, rows.x, rows.y, width=width, **how)
        said = replay(judged_on, Judge(), rows, made.best, padded)
        missed = made.failed | _failed(said)
        entries.append(_entry(name, attack, rows, made, said, missed, time.perf_counter() - begin))
        outcomes.append(_outcome(every, sample, untouched, held, made.best, said, missed))
    return Transfer(len(x), len(held), tuple(entries), tuple(outcomes))


def _models(surrogates: object, target: object) -> tuple[Model, Model]:
    several = list(surrogates) if isinstance(surrogates, list | tuple) else [surrogates]
    crafted_on, judged_on = wrap(several[0]) if len(several) == 1 else Ensemble(several), wrap(target)
    if tuple(crafted_on.bounds) != tuple(judged_on.bounds):
        raise ModelError(
            f"expected surrogates and target with the same bounds, got {crafted_on.bounds} and {judged_on.bounds}; "
            f"give all of them raw pixels, and mean and std to each: wrap(net, mean=..., std=...)"
        )
    return crafted_on, judged_on


def _check(crafted_on: Model, judged_on: Model, x: Tensor, y: Tensor, goal: Tensor | None) -> None:
    """Refuse images, labels and pairs of models that do not fit each other."""
    preflight.check_images(x, judged_on.bounds)
    classes = preflight.check_model(judged_on, x, Access.DECISION)
    preflight.check_labels(y, len(x), classes=classes)
    if goal is not None:
        preflight.check_labels(goal, len(x), "goals", classes)
    others = preflight.check_model(crafted_on, x, Access.DECISION)
    if None not in (classes, others) and classes != others:
        raise ModelError(f"expected surrogates with the {classes} classes of the target, got {others}")


def _failed(judged: Judged) -> Tensor:
    """(n,) bool: rows that the model could not answer for."""
    return judged.label < 0


def _entry(
    name: str, attack: Attack, rows: Batch, made: Outcome, said: Judged, missed: Tensor, seconds: float
) -> Carried:
    fooled = Judge().adversarial(rows, made.best, Prediction(made.label))
    fell = said.hit & ~missed
    best, origin = made.best[fell], rows.x[fell]
    return Carried(
        name=name,
        attack=repr(attack),
        threat=rows.threat.describe(),
        surrogate=mean(fooled[~missed]),
        target=mean(fell[~missed]),
        mean_linf=mean(Linf(1.0).distance(best, origin)),
        mean_l2=mean(L2(1.0).distance(best, origin)),
        confidence=mean(said.score[fell]),
        forward=int(made.forward.sum()),
        backward=int(made.backward.sum()),
        queries=len(rows.x),
        failed=int(missed.sum()),
        seconds=round(seconds, 3),
    )


def _outcome(
    every: Batch, sample: Tensor, untouched: Judged, held: Tensor, points: Tensor, said: Judged, missed: Tensor
) -> Outcome:
    """All rows as the target has them; `forward` counts its answers to points: one for each row that was held."""
    none = torch.zeros_like(every.y)
    best = every.x.index_copy(0, held, points)
    return Outcome(
        sample=sample,
        clean=untouched.hit,
        found=untouched.hit.index_copy(0, held, said.hit & ~missed),
        moved=torch.zeros_like(untouched.hit),
        failed=_failed(untouched).index_copy(0, held, missed),
        best=best,
        distance=every.threat.distance(best, every.x),
        clean_label=untouched.label,
        clean_confidence=untouched.score,
        label=untouched.label.index_copy(0, held, said.label),
        confidence=untouched.score.index_copy(0, held, said.score),
        forward=none.index_fill(0, held, 1),
        backward=none,
    )
