"""One defense: everything that is tried on it, on the same rows and by the same seeds as on all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparring import catalog
from sparring.auditing import curve
from sparring.auditing.audit import Audit, audit
from sparring.auditing.evidence import Evidence
from sparring.auditing.hunt import Front, Setting
from sparring.auditing.run import Run
from sparring.auditing.standing import Standing
from sparring.auditing.victim import meet
from sparring.core.errors import AttackError, ModelError
from sparring.core.model import Model
from sparring.core.verdict import Verdict
from sparring.defending.bench import Bench
from sparring.defending.deployed import CARRIED, NAIVE, Deployed, deployed
from sparring.defending.smoothed import Claim, claim
from sparring.defending.workshop import Subject, Tell
from sparring.engine import width as widths
from sparring.engine.loop import run as play

LABELS = {"linf": "rays", "l2": "hopskipjump"}  # the attack that sees labels only, by norm; L1 has none here
ASKED = 32  # rows that it meets, of those that everything else has left
QUERIES = 500  # of each of them


@dataclass(frozen=True)
class Borrowed:
    """What came of the images that broke other defenses, on the rows that everything else had left."""

    names: Sequence[str]  # of all defenses, in order
    met: Tensor  # (n,) int64: how many others had an image of the row to lend
    by: Tensor  # (n,) int64: the place in `names` of the first whose image broke the row; -1: none
    points: Tensor  # (m, c, h, w) the images that did, in the order of the rows

    @property
    def fell(self) -> Tensor:
        """(n,) bool: rows that fell so."""
        return self.by >= 0

    @property
    def lenders(self) -> list[str]:
        """The names of those whose images broke something."""
        return [self.names[number] for number in sorted(set(self.by[self.fell].tolist()))]


@dataclass(frozen=True)
class Measured:
    """What came of one defense; the masks are (n,) bool in the order of the images."""

    subject: Subject
    deployed: Deployed
    audit: Audit
    verdicts: tuple[Verdict, ...]  # of the audit
    labels: dict[str, Any]  # the attack that sees labels only
    named: Tensor  # the rows that fell to it
    points: Tensor  # (n, c, h, w) by these images; elsewhere the clean one
    curve: dict[str, Any]  # robust accuracy over eps, as `auditing.curve` has it
    claim: Claim | None = None  # of randomised smoothing, which proves nothing
    borrowed: Borrowed | None = None  # once all are measured

    @property
    def right(self) -> Tensor:
        """(n,) bool: rows that are right untouched: of a random guard under the attacker's draws, too.

        What those alone misread fell to no attack, and so is neither naive strength nor adaptive weakness.
        """
        return self.deployed.right & ~_are(self.verdicts, Verdict.MISCLASSIFIED)

    @property
    def naive(self) -> Tensor:
        """(n,) bool: rows that hold against the attack that ignores the defense."""
        return self.deployed.naive & self.right

    @property
    def held(self) -> Tensor:
        """(n,) bool: rows that hold against everything; a row that anything broke is broken."""
        held = _held(self.deployed, self.verdicts) & ~self.named
        return held if self.borrowed is None else held & ~self.borrowed.fell

    @property
    def certified(self) -> Tensor:
        """(n,) bool: rows that are proved robust."""
        return self.held & self.proved

    @property
    def proved(self) -> Tensor:
        """(n,) bool: rows that the audit certified; one that is not held contradicts its proof."""
        return _are(self.verdicts, Verdict.CERTIFIED)

    @property
    def unanswered(self) -> Tensor:
        """(n,) bool: rows that hold only because the defense, or what attacks it, failed on them."""
        return self.held & _are(self.verdicts, Verdict.ERROR)

    def missed(self) -> dict[str, int]:
        """Rows that the adaptive attack left and something simpler broke, by what that was."""
        left = self.right & ~_lost(self.verdicts)
        fell = {"naive": self.deployed.fallen(NAIVE), "transfer": self.deployed.fallen(CARRIED)}
        fell |= {"label-only": self.named}
        fell |= {} if self.borrowed is None else {"borrowed": self.borrowed.fell}
        return {name: int((mask & left).sum()) for name, mask in fell.items()}

    def decided(self) -> dict[int, str]:
        """The last stage of the audit that had a word on each row, by id: of a broken one the stage that broke it."""
        standing = Standing.of(Evidence(Run.open(self.audit.run)))
        stages = (standing.stages[stage] for stage in standing.stage.tolist())
        return dict(zip(standing.ids.tolist(), stages, strict=True))


def _lost(verdicts: tuple[Verdict, ...]) -> Tensor:
    """(n,) bool: rows that the audit found broken, or misread under its own draws."""
    return _are(verdicts, Verdict.BROKEN, Verdict.MISCLASSIFIED)


def _are(verdicts: tuple[Verdict, ...], *kinds: Verdict) -> Tensor:
    return torch.tensor([verdict in kinds for verdict in verdicts])


def _held(found: Deployed, verdicts: tuple[Verdict, ...]) -> Tensor:
    return found.naive & ~found.fallen(CARRIED) & ~_lost(verdicts)


def measure(bench: Bench, subject: Subject) -> Measured:
    """Try everything on `subject`; each part that the run has whole is taken from there.

    The adaptive attack is the audit, of what the guard says follows from its claims (`Guard.adaptive`): all that it
    finds is confirmed on the defense as deployed.
    """
    name = subject.entry.slug
    judged, knowing = subject.judged(bench.draws), subject.adaptive(bench.draws)
    tell = partial(_aloud, bench.tell, subject.entry.name)
    seen = deployed(bench, subject, judged)
    found = audit(
        knowing,
        bench.images,
        bench.threat,
        profile=bench.profile,
        seed=bench.seed,
        device=bench.device,
        out=bench.run.path / "audits" / name,
        name=subject.entry.name,
        tell=tell,
    )
    by_id = found.verdicts()
    verdicts = tuple(by_id[row] for row in bench.images.ids.tolist())
    held = _held(seen, verdicts)
    labels, by_labels = bench.once(f"labels--{name}", lambda: _labels_only(bench, judged, held, tell))
    drawn = Run.open(found.run).figures("curve")
    if drawn is None:
        right = seen.right & ~_are(verdicts, Verdict.MISCLASSIFIED)
        drawn, _ = bench.once(f"curve--{name}", lambda: (_curve(bench, knowing, right), {}))
    said = None if seen.claims else claim(bench, subject)  # which hangs on what the guard claims of itself
    named, points = by_labels["named"], by_labels["points"]
    return Measured(subject, seen, found, verdicts, labels, named, points, drawn, said)


def _aloud(tell: Tell, name: str, what: str, done: int, of: int) -> None:
    tell(f"{name}: {what}", done, of)


def _labels_only(bench: Bench, judged: Model, held: Tensor, tell: Tell) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An attack that sees labels only, as deployed, on a few of the rows that hold so far."""
    images, name = bench.images, LABELS.get(bench.threat.norm)
    found, points = torch.zeros_like(held), images.x.clone()
    at = held.nonzero().squeeze(1)
    at = at[torch.linspace(0, len(at) - 1, min(ASKED, len(at))).long()] if len(at) else at
    told: dict[str, Any] = {"attack": name, "queries": QUERIES, "rows": len(at), "broke": 0, "why_not": None}
    if name is None:
        told |= {"rows": 0, "why_not": f"no attack here works from labels in {bench.threat.norm}"}
    elif len(at):
        try:
            out = play(
                judged,
                catalog.attack(name, steps=QUERIES),
                bench.threat,
                bench.to(images.x[at]),
                bench.to(images.y[at]),
                sample=bench.to(images.ids[at]),
                seed=bench.seed,
                on_progress=partial(tell, "labels only"),
            )
        except (AttackError, ModelError) as error:  # one that answers as it likes, say
            return told | {"rows": 0, "why_not": str(error)}, {"named": found, "points": points}
        found[at] = (out.found & ~out.clean).cpu()
        points[found] = out.best.cpu()[found[at]]
        told["broke"] = int(found.sum())
    return told, {"named": found, "points": points}


def _curve(bench: Bench, model: Model, right: Tensor) -> dict[str, Any]:
    """Robust accuracy over eps on a few rows, where the audit's profile draws none; empty where nothing is right."""
    at = right.nonzero().squeeze(1)
    if not len(at) or not bench.threat.eps:
        return {}
    at = at[torch.linspace(0, len(at) - 1, min(curve.ROWS, len(at))).long()]
    x, y, ids = (bench.to(part[at]) for part in (bench.images.x, bench.images.y, bench.images.ids))
    victim = meet(model, bench.images, bench.threat, bench.device)
    setting = Setting(victim, bench.threat, widths.automatic(x[0]), bench.seed, device=bench.device)
    front = Front(x, y, ids, x, torch.full((len(x),), -torch.inf, device=x.device))
    return curve.measure(setting, front, float(right.double().mean()), lambda: False) or {}
