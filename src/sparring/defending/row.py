"""A line of the table, and what stands behind it, from what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparring import catalog
from sparring.auditing.intervals import clopper_pearson
from sparring.auditing.masking import ZERO_GRADIENT
from sparring.core.model import Access
from sparring.core.showing import number_of, percent, rounded
from sparring.data.images import Images
from sparring.defending.bench import Bench
from sparring.defending.deployed import CARRIED, NAIVE
from sparring.defending.finding import Counts, Finding, judge
from sparring.defending.measure import Measured
from sparring.defending.plan import REFERENCE

KEYS = (
    "defense", "clean", "naive", "adaptive", "lower", "upper", "certified", "training_cost", "inference_cost",
    "finding", "signs", "details",
)  # fmt: skip
SHOWN = 10
BORROWED = "borrowed: "
_BEATS = {name: f"the {name} attack" for name in ("naive", "transfer", "label-only")}
_BEATS |= {"borrowed": "what broke other defenses"}
_ADVICE = "counted as broken; take a deeper profile, and look at what the defense claims"


def row(measured: Measured, base: Measured, training: float, inference: float) -> dict[str, Any]:
    """The keys of `KEYS`, as JSON values; `base` is the undefended net.

    `upper` is `adaptive`: what nothing here broke. `certified` is None where no proof was within reach, and then
    `lower` is 0.
    """
    entry, rows = measured.subject.entry, len(measured.right)
    found = judge(_counts(measured, base), reference=entry.role == REFERENCE)
    proofs = measured.audit.figures.get("proofs") or {}
    certified = _share(measured.certified) if proofs.get("methods") else None
    held = int(measured.held.sum())
    values = (
        entry.name,
        _share(measured.right),
        _share(measured.naive),
        _share(measured.held),
        certified or 0.0,
        _share(measured.held),
        certified,
        training,
        inference,
        found.word,
        signs(measured),
        {
            "role": entry.role,
            "sentence": found.sentence,
            "intervals": _intervals(found, int(measured.certified.sum()), held, rows),
            **_about(measured),
            "tried": tried(measured),
            "curve": measured.curve,
            "smoothed": None if measured.claim is None else measured.claim.told(measured.held),
            "audit": _audited(measured),
        },
    )
    return dict(zip(KEYS, values, strict=True))


def _share(mask: Tensor) -> float:
    return rounded(mask.double().mean().item()) or 0.0


def _counts(measured: Measured, base: Measured) -> Counts:
    held, right = measured.held, measured.right
    return Counts(
        rows=len(right),
        right=int(right.sum()),
        naive=int(measured.naive.sum()),
        adaptive=int(held.sum()),
        gained=int((held & ~base.held & ~measured.unanswered).sum()),
        given=int((~held & base.held).sum()),
        lost=int((base.right & ~right).sum()),
        won=int((right & ~base.right).sum()),
    )


def _intervals(found: Finding, certified: int, held: int, rows: int) -> dict[str, list[float]]:
    """For all such images, with 95 % confidence: [low, high], and of the differences [value, low, high]."""
    ends = [clopper_pearson(certified, rows)[0], clopper_pearson(held, rows)[1]]
    both = {"robust_accuracy": ends, "adaptive": list(clopper_pearson(held, rows))}
    for name in ("illusion", "gain", "price"):
        share = getattr(found, name)
        both[name] = [share.value, share.low, share.high]
    return {name: [round(value, 6) for value in values] for name, values in both.items()}


def _about(measured: Measured) -> dict[str, Any]:
    """What the defense is."""
    subject, guard = measured.subject, measured.subject.guard
    recipe: Any = subject.entry.recipe
    trained = catalog.defenses()[catalog.parse(recipe)[0]] if isinstance(recipe, str) else type(recipe)
    return {
        "net": subject.key,
        "recipe": recipe if isinstance(recipe, str) else repr(recipe),
        "guard": None if guard is None else str(guard),
        "parts": [_part(kind) for kind in (trained, *(() if guard is None else (type(guard),)))],
        "differentiable": None if guard is None else guard.differentiable,
        "randomised": None if guard is None else guard.randomised,
        "detects": None if guard is None else guard.detects,
        "without_gradient": round(measured.deployed.silent, 6),
    }


def _part(kind: type[Any]) -> dict[str, str | None]:
    """A recipe or a guard in a sentence, and whom it is from."""
    said = (kind.__doc__ or "").replace("`", "").strip().partition("\n\n")[0]
    return {"name": kind.name, "paper": getattr(kind, "paper", None), "about": " ".join(said.split()) or None}


def signs(measured: Measured) -> list[str]:
    """The warning signs, each `name: what was seen`: of the gradient, the claims, the audit, and the sentinels."""
    found = list(measured.deployed.claims)
    if measured.deployed.silent > ZERO_GRADIENT:
        found.append(
            f"no_gradient: as deployed, {percent(measured.deployed.silent, 1)} of the rows have no gradient of the "
            f"cross-entropy, so an attack that follows it goes nowhere"
        )
    found += measured.audit.warnings
    found += [
        f"{name.replace('-', '_')}_beats_adaptive: {_BEATS[name]} broke {number_of(count, 'row')} that the "
        f"adaptive one left, {_ADVICE}"
        for name, count in measured.missed().items()
        if count
    ]
    if failed := int(measured.unanswered.sum()):
        found.append(
            f"no_answer: the adaptive attack got no answer for {number_of(failed, 'row')} that nothing else broke; "
            f"counted as held, but not as gained; the audit's rows.csv has the reasons"
        )
    broken_proofs = int((measured.proved & ~measured.held).sum())
    if broken_proofs:
        found.append(
            f"proof_contradicted: the image of {number_of(broken_proofs, 'row')} contradicts a proof; report this"
        )
    if (why := measured.labels["why_not"]) is not None and measured.labels["attack"] is not None:
        found.append(f"labels_not_tried: {why}")
    return found


def tried(measured: Measured) -> list[dict[str, Any]]:
    """Every stage: how many rows it met, and how many of them it broke."""
    fell = measured.deployed.fell

    def carried(prefix: str) -> list[dict[str, Any]]:
        return [
            _stage(name, measured.right, mask & measured.right)
            for name, mask in fell.items()
            if name.startswith(prefix)
        ]

    stages = [
        {"stage": f"adaptive: {stage['name']}", "rows": stage["rows"], "broke": stage["broken"]}
        | ({"certified": stage["certified"]} if "certified" in stage else {})
        for stage in measured.audit.figures["stages"][1:]  # the first are the untouched images
    ]
    labels = measured.labels
    last = [{"stage": f"labels only: {labels['attack']}", "rows": labels["rows"], "broke": labels["broke"]}]
    lent = measured.borrowed
    return [
        *carried(NAIVE),
        *stages,
        *carried(CARRIED),
        *(last if labels["attack"] else []),
        *([] if lent is None else [_stage(f"{BORROWED}images of others", lent.met > 0, lent.fell)]),
    ]


def _stage(name: str, met: Tensor, broke: Tensor) -> dict[str, Any]:
    return {"stage": name, "rows": int(met.sum()), "broke": int(broke.sum())}


def _audited(measured: Measured) -> dict[str, Any]:
    """The audit of the adaptive attack, apart from what its own folder tells."""
    figures = measured.audit.figures
    kept = ("robust_accuracy", "population", "counts", "warnings", "moved", "complete")
    return {"run": f"audits/{measured.subject.entry.slug}", **{key: figures[key] for key in kept}}


def shown(base: Measured, images: Images) -> Tensor:
    """(m,) the first rows that the undefended net gets right: the same are shown under every defense."""
    return base.right.nonzero().squeeze(1)[:SHOWN]


def pictures(measured: Measured, bench: Bench, at: Tensor) -> tuple[list[dict[str, Any]], Tensor]:
    """What became of the rows `at`, and the image of each that shows it: of one that holds, the last point of PGD."""
    images, witnesses, decided = bench.images, measured.audit.witnesses(), measured.decided()
    told, points = [], []
    for place in at.tolist():
        row_id = int(images.ids[place])
        outcome, by, point = _fate(measured, bench, place, (decided.get(row_id), witnesses.get(row_id)))
        points.append(point)
        told.append({"id": row_id, "label": int(images.y[place]), "outcome": outcome, "by": by})
    changed = torch.stack(points) if points else images.x[:0]
    far = bench.threat.distance(changed, images.x[at]).tolist()
    before, after = measured.deployed.said[at].tolist(), _named(measured, bench, changed)
    for fact, distance, clean, label in zip(told, far, before, after, strict=True):
        flagged = clean == len(images.classes)  # the class after the last
        fact |= {"distance": rounded(distance), "prediction": None if flagged else clean}
        fact |= {"adversarial_prediction": label}
    return told, changed


def _named(measured: Measured, bench: Bench, x: Tensor) -> list[int | None]:
    """What the defense says of images `x` (m, c, h, w): a class, or None where its detector flags."""
    if not len(x):
        return []
    said = measured.subject.judged(bench.draws).query(bench.to(x), Access.DECISION)
    flagged = torch.zeros_like(said.labels, dtype=torch.bool) if said.flagged is None else said.flagged
    return [None if flag else label for label, flag in zip(said.labels.tolist(), flagged.tolist(), strict=True)]


def _fate(
    measured: Measured, bench: Bench, place: int, audited: tuple[str | None, Tensor | None]
) -> tuple[str, str | None, Tensor]:
    """The outcome of a row, what decided it, and the image that shows it; `audited`: the stage and its image."""
    clean, (stage, witness) = bench.images.x[place], audited
    made = bench.crafted[measured.subject.key]
    last = made.get("pgd", next(iter(made.values())))[place]
    if not measured.right[place]:
        return "misclassified", None, clean
    if witness is not None:
        return "broken", f"adaptive: {stage}", witness
    for name, mask in measured.deployed.fell.items():
        if mask[place]:
            key, _, net = name.partition(": ")[2].partition(" on ")
            return "broken", name, bench.crafted[net or measured.subject.key][key][place]
    if measured.named[place]:
        return "broken", f"labels only: {measured.labels['attack']}", measured.points[place]
    if (lent := measured.borrowed) is not None and lent.fell[place]:
        return "broken", f"{BORROWED}{lent.names[int(lent.by[place])]}", lent.points[int(lent.fell[:place].sum())]
    return ("certified" if measured.certified[place] else "undecided"), None, last


def order(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By the adaptive figure, descending; of equals by clean accuracy and name."""
    return sorted(rows, key=lambda one: (-one["adaptive"], -one["clean"], one["defense"]))
