"""Attacks that run one after the other on the same images, and what a person is told of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparring.auditing.plan import common
from sparring.auditing.run import Run
from sparring.cli import options
from sparring.cli.show import Show
from sparring.comparison import Comparison, Trial, trial
from sparring.comparison.trial import chosen
from sparring.core.errors import UsageError
from sparring.core.showing import figure, percent, rounded
from sparring.core.threat import NORMS, Threat
from sparring.data import Images
from sparring.data.images import to_bytes
from sparring.engine.outcome import Outcome
from sparring.models.spec import Named
from sparring.reporting import write_report
from sparring.reporting.wording import norm_name

SHOWN = 12


@dataclass(frozen=True)
class Contest:
    """What is asked for: all that must be the same when a run is taken up."""

    kind: str  # of the run
    victim: Named
    images: Images
    attacks: Sequence[str]
    threat: Threat
    bounded: bool  # else the threat model lets every image be reached
    target: str | None
    goal: Tensor | None
    seed: int
    device: str
    how: dict[str, Any]  # confidence, restarts, eight_bit, width, budget

    @property
    def limits(self) -> str:
        """The threat model in words."""
        return self.threat.describe() if self.bounded else f"{self.threat.norm}, any distance"

    @property
    def plan(self) -> dict[str, Any]:
        """What the run writes down before it starts."""
        budget = self.how["budget"]
        settings = {
            "attacks": {text: repr(chosen(text, self.threat, budget)[1]) for text in self.attacks},
            "threat": self.limits,
            "target": self.target,
        }
        return {
            "model": self.victim.name,
            "model_digest": self.victim.digest,
            "data": self.images.name,
            "rows": {"test": len(self.images)},
            "settings": settings | self.how,
            **common(self.images, self.seed, self.device),
        }

    def trial(self, run: Run, place: int, show: Show) -> Trial:
        """One attack; what an earlier run of the same plan has finished is not done again."""
        text, section = self.attacks[place], f"attack-{place:02d}"
        if stored := run.tensors(section):
            return Trial.of(*chosen(text, self.threat, self.how["budget"]), stored)
        done = trial(
            self.victim.model,
            self.images.x.to(self.device),
            self.images.y.to(self.device),
            text,
            self.threat,
            target=None if self.goal is None else self.goal.to(self.device),
            sample=self.images.ids.to(self.device),
            seed=self.seed,
            on_progress=partial(show.tick, text),
            **self.how,
        )
        run.keep(section, done.tensors())
        return done


def goal(target: str | None, images: Images, needed: bool) -> Tensor | None:
    """(n,) the classes to reach, or None for any wrong one."""
    if target is None and not needed:
        return None
    if target in (None, "next"):
        return (images.y + 1) % len(images.classes)
    if not target.isdigit() or int(target) >= len(images.classes):
        raise UsageError(f"expected --target from 0 to {len(images.classes) - 1}, or next, got {target!r}")
    return torch.full_like(images.y, int(target))


def play(show: Show, out: Path | None, contest: Contest) -> dict[str, Any]:
    """Run the attacks, keep what they found, and tell it; a run that was cut short goes on."""
    run = Run.create(out, contest.kind, contest.plan)
    with options.counted(show, contest.victim, run.path), show.progress():
        trials = [contest.trial(run, place, show) for place in range(len(contest.attacks))]
    found = Comparison.of(trials, contest.threat, contest.images.x)
    figures = _figures(contest, found)
    shown, tensors = _gallery(contest.images, found)
    figures |= {"rule": "the first test images that fell to the strongest attack here", "shown": shown}
    each, changed = _each(contest.images, found)
    run.record("attack", figures | each, tensors | changed)
    run.write("attacks.csv", _csv(figures["attacks"]))
    run.write("rows.csv", _rows_csv(contest, found))
    run.write_result()
    report = write_report(run)
    _tell(show, figures)
    show.say(f"report: {report}")
    figures |= {"report": str(report), "run": str(run.path), "queries": options.queries(contest.victim)}
    show.result(figures)
    return figures


def _figures(contest: Contest, found: Comparison) -> dict[str, Any]:
    images, targeted = contest.images, contest.goal is not None
    right = (found.outcomes[0].clean_label.cpu() == images.y).double().mean().item()
    summary = found.summary()
    return {
        "rows": len(images),
        "model": contest.victim.name,
        "data": images.name,
        "threat": contest.limits,
        "budget": contest.how["budget"],
        "clean_accuracy": rounded(right),
        "targeted": targeted,
        **summary,
        "worst_case_accuracy": None if targeted else summary["worst_case_accuracy"],
        "attacks": found.figures(),
    }


def _gallery(images: Images, found: Comparison) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """A few images that fell to the strongest attack (of equals, to the nearest), and what was said of each."""
    shares = zip(found.outcomes, found.optimality, strict=True)
    best = max(shares, key=lambda pair: (-pair[0].robust_accuracy, pair[1] or 0.0))[0]
    fell = (best.found & ~best.clean).cpu().nonzero().squeeze(1)[:SHOWN]
    shown = [_said(images, best, i) for i in fell.tolist()]
    return shown, {"x": to_bytes(images.x[fell]), "adversarial": to_bytes(best.best.cpu()[fell])}


def _said(images: Images, outcome: Outcome, i: int) -> dict[str, Any]:
    """What the model says of an image and of what an attack made of it."""
    return {
        "label": int(images.y[i]),
        "prediction": int(outcome.clean_label[i]),
        "confidence": rounded(float(outcome.clean_confidence[i])),
        "adversarial_prediction": int(outcome.label[i]),
        "adversarial_confidence": rounded(float(outcome.confidence[i])),
        "distance": rounded(float(outcome.distance[i])),
    }


def _each(images: Images, found: Comparison) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The first image that fell to the most attacks, and what each of them made of it."""
    fell = torch.stack([outcome.found & ~outcome.clean for outcome in found.outcomes]).cpu()
    row = int(fell.sum(0).argmax())
    at = fell[:, row].nonzero().squeeze(1).tolist()
    if len(at) < 2:
        return {}, {}
    figures = [_said(images, found.outcomes[place], row) | {"attack": found.entries[place].name} for place in at]
    changed = torch.stack([found.outcomes[place].best[row].cpu() for place in at])
    return (
        {"each": {"id": int(images.ids[row]), "attacks": figures}},
        {"each_x": images.x[row : row + 1], "each_adversarial": changed},
    )


def _csv(entries: Sequence[dict[str, Any]]) -> bytes:
    """One attack a line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(entries[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(entries)
    return text.getvalue().encode()


def _rows_csv(contest: Contest, found: Comparison) -> bytes:
    """One image a line: the distance that each attack found, empty where it found nothing, and the best of all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "label", "best", *contest.attacks])
    table = torch.cat([found.best[None], found.distances]).T.tolist()
    for row, label, far in zip(contest.images.ids.tolist(), contest.images.y.tolist(), table, strict=True):
        writer.writerow([row, label, *("" if distance == float("inf") else f"{distance:.9g}" for distance in far)])
    return text.getvalue().encode()


def _tell(show: Show, figures: dict[str, Any]) -> None:
    rows, entries = figures["rows"], figures["attacks"]
    several = len(entries) > 1
    head = ["attack", "success", "median", *["optimal"] * several, "8-bit", "conf.", "passes", "seconds"]
    title = (
        f"{figures['model']} on {rows} rows of {figures['data']}: "
        f"clean accuracy {percent(figures['clean_accuracy'])}; {figures['threat']}"
    )
    show.table(
        title,
        head,
        [
            [
                e["name"],
                percent(e["success"], 1),
                figure(e["median"]) + (" *" if e["front"] else "  ") * several,
                *[percent(e["optimality"], 1)] * several,
                percent(e["eight_bit"], 1),
                percent(e["confidence"], 1),
                figure((e["forward"] + e["backward"]) / rows, 1),
                figure(e["seconds"], 2),
            ]
            for e in entries
        ],
    )
    norms = list(NORMS)
    show.table(
        "distance in every norm: the median of all rows, the mean of those that fell",
        ["attack", *(f"{norm_name(norm)} {kind}" for norm in norms for kind in ("median", "mean"))],
        [
            [
                e["name"],
                *(figure(e[f"{kind}_{n}"], 1 if n == "l0" else 3) for n in norms for kind in ("median", "mean")),
            ]
            for e in entries
        ],
    )
    if several:
        show.say("*: no other attack here reaches that success at that median for fewer passes")
    _remarks(show, figures)


def _remarks(show: Show, figures: dict[str, Any]) -> None:
    entries = figures["attacks"]
    unconfirmed = sum(entry["unconfirmed"] for entry in entries)
    if unconfirmed:
        show.say(
            f"not counted: {unconfirmed} images that fooled the model once and, judged again, did not: rounding, "
            f"or other draws of a random model"
        )
    for entry in entries:
        if entry["failed"]:
            show.say(f"{entry['name']}: {entry['failed']} rows that the model could not answer for count as neither")
    if not figures["targeted"]:
        show.say(f"accuracy under the worst of them, an upper bound: {percent(figures['worst_case_accuracy'])}")
