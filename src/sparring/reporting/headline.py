"""The top of the page: the run in a handful of figures, and one picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from sparring.auditing.run import Run
from sparring.defending.finding import HOLDS, REFERENCE
from sparring.reporting.audited import pixel_range, total
from sparring.reporting.defended import called, share
from sparring.reporting.markup import block, tile
from sparring.reporting.pictures import as_bytes, picture
from sparring.reporting.robustness import Models, robust_curve, training_eps
from sparring.reporting.wording import (
    MISSING,
    class_namer,
    confidence,
    count,
    data_name,
    net_name,
    number,
    percent,
    plain,
    span,
    threat_name,
)


@dataclass(frozen=True)
class Card:
    """One figure with what it measures; `side` is the corner it speaks for, the model's or the attack's."""

    label: str
    value: str
    note: str
    side: str = "model"


def title(plan: Mapping[str, Any]) -> str:
    """The heading of the page."""
    name = data_name(plan)
    if plan.get("kind") == "audit":
        return "The robustness audit" if plan.get("data") in (None, "images") else f"{name}: the robustness audit"
    if plan.get("kind") == "smooth":
        return f"{name}: smoothed by noise"
    if plan.get("kind") == "certify":
        return f"{name}: what is proved"
    if plan.get("kind") == "defend":
        return f"{name}: which defenses hold"
    return f"{name}: the training report" if plan.get("kind") == "train" else f"{name} under attack"


def summary(plan: Mapping[str, Any]) -> str:
    """The data and the seed in a line; of an audit, the model and the threat model first."""
    rows = plan.get("rows")
    judged = plan.get("kind") in ("audit", "certify")
    told = [str(plan.get("model", "a model not named")), threat_name(plan)] if judged else []
    told += [net_name((plan.get("settings") or {}).get("net", "")), threat_name(plan)] * (
        plan.get("kind") == "defend"
    )
    told += [f"{size:,} {split} images" for split, size in rows.items()] if isinstance(rows, dict) else []
    told += [f"{word} {plan[key]}" for word, key in (("seed", "seed"), ("on", "device")) if key in plan]
    return ", ".join(told)


def picture_pair(run: Run) -> Markup:
    """The first image the run shows, before and after an attack."""
    for section in ("fgsm", "attack", "gallery", "universal", "patch"):
        tensors, shown = run.tensors(section), (run.figures(section) or {}).get("shown")
        if shown and {"x", "adversarial"} <= tensors.keys() and len(tensors["x"]):
            pair = (as_bytes(tensors[key][:1], pixel_range(run.plan))[0] for key in ("x", "adversarial"))
            name, fact = class_namer(run.plan), shown[0]
            before, after = name(fact.get("prediction")), name(fact.get("adversarial_prediction"))
            fooled = fact.get("adversarial_prediction") != fact.get("label")
            said = Markup("read as <strong>{}</strong>")
            clean = picture(next(pair), f"a clean image, read as {before}")
            attacked = picture(next(pair), f"the same image attacked, read as {after}")
            first = tile(clean, said.format(before), confidence(fact.get("confidence")))
            sure = confidence(fact.get("adversarial_confidence"))
            second = tile(attacked, said.format(after), sure, style="fooled" * fooled)
            return block("duel", first, second)
    return Markup()


def cards(run: Run) -> list[Card]:
    """The figures that decide, in the order of the page."""
    makers: Sequence[tuple[str, Callable[[dict[str, Any]], list[Card]]]] = (
        ("train", _trained),
        ("fooling", _fooled),
        ("targeted", _targeted),
        ("defend", _defended),
        ("attack", _attacked),
        ("universal", _shared),
        ("patch", _shared),
        ("certify", _certified),
        ("defenses", _ranked),
    )
    audited = _audited(run)
    return [card for section, make in makers if (figures := run.figures(section)) for card in make(figures)] + audited


def _trained(figures: dict[str, Any]) -> list[Card]:
    """Clean accuracy, a card a network."""
    nets = {name: net for name, net in figures.items() if isinstance(net, dict)}
    return [Card("clean accuracy", percent(net.get("accuracy")), net_name(name)) for name, net in nets.items()]


def _fooled(figures: dict[str, Any]) -> list[Card]:
    """The least confidence among the noise images."""
    entries = [entry for net in (figures.get("nets") or {}).values() for entry in net]
    sure = [entry["confidence"] for entry in entries if entry.get("confidence") is not None]
    least = confidence(min(sure, default=figures.get("min_confidence")))
    return [Card("least confidence in pure noise", least, f"over {len(entries)} noise images", "attack")]


def _targeted(figures: dict[str, Any]) -> list[Card]:
    """The pairs the improved attack reached, against the classic one."""
    classic, improved = figures.get("classic") or {}, figures.get("improved") or {}
    if not improved:
        return []
    value = f"{improved.get('reached')} of {improved.get('pairs')}"
    return [
        Card(
            "targeted pairs, improved attack",
            value,
            f"classic: {classic.get('reached', 'not run')}",
            "attack",
        )
    ]


def _defended(figures: dict[str, Any]) -> list[Card]:
    """Robust accuracy of the first model without a training eps, and of the first with one."""
    models: Models = figures.get("models") or {}
    eps = training_eps(models)
    if eps is None:
        return []
    soft = [name for name, model in models.items() if model.get("eps") is None][:1]
    hard = [name for name, model in models.items() if model.get("eps") is not None][:1]
    shares = [percent(robust_curve(models[name]).get(eps)) for name in soft + hard]
    note = f"{' → '.join(soft + hard)}; an upper bound"
    return [Card(f"robust accuracy at eps {plain(eps)}", " → ".join(shares), note)]


def _attacked(figures: dict[str, Any]) -> list[Card]:
    """The strongest attack."""
    ranked = [attack for attack in figures.get("attacks") or [] if attack.get("success") is not None]
    if not ranked:
        return []
    best = max(ranked, key=lambda attack: attack["success"])
    note = f"{best.get('name')}, {figures.get('threat', 'threat model not recorded')}"
    return [Card("success of the strongest attack", percent(best["success"]), note, "attack")]


def _shared(figures: dict[str, Any]) -> list[Card]:
    """What one perturbation or patch does to images that it was not fitted on, and what does as much unfitted."""
    what, rates = figures.get("what", "perturbation"), figures.get("rates") or {}
    controls = {name: rate for name, rate in rates.items() if name != "fitted" and rate is not None}
    best = max(controls, key=lambda name: controls[name], default=MISSING)
    return [
        Card(f"success of one {what}", percent(rates.get("fitted")), str(figures.get("threat", MISSING)), "attack"),
        Card(f"the same, not fitted: {best}", percent(controls.get(best)), "the best of the controls"),
    ]


def _certified(figures: dict[str, Any]) -> list[Card]:
    """What is proved, what a quick attack leaves, and clean accuracy."""
    rows, far = count(figures.get("rows")), figures.get("empirical") or {}
    return [
        Card("certified accuracy", percent(figures.get("certified_accuracy")), f"{figures['method']}, {rows} images"),
        Card("left by a quick attack", percent(far.get("robust_accuracy")), "an upper bound", "attack"),
        Card("clean accuracy", percent(figures.get("clean_accuracy")), "the same images, untouched"),
    ]


def _ranked(figures: dict[str, Any]) -> list[Card]:
    """Of defenses side by side: the best, the undefended net, what only seemed to hold, and how many hold."""
    rows = [row for row in figures.get("defenses") or [] if None not in (row.get("adaptive"), row.get("naive"))]
    if not rows:
        return []
    best, fooled = rows[0], max(rows, key=lambda row: row["naive"] - row["adaptive"])
    plain_ones = [row for row in rows if row.get("finding") == REFERENCE]
    holding = sum(row.get("finding") == HOLDS for row in rows)
    told = [Card("adaptive accuracy of the first", share(best["adaptive"]), f"{called(best)}; an upper bound")]
    told += [
        Card("the same, undefended", share(row["adaptive"]), f"clean {share(row.get('clean'))}", "attack")
        for row in plain_ones[:1]
    ]
    between = f"{share(fooled['naive'])} → {share(fooled['adaptive'])}"
    told.append(Card("largest illusion, naive → adaptive", between, called(fooled), "attack"))
    return [*told, Card("defenses that hold", count(holding), f"of {len(rows) - len(plain_ones)}")]


def _audited(run: Run) -> list[Card]:
    """The interval of an audit, what it stands on, what it cost, and whether to trust it."""
    figures = run.figures("audit")
    if not figures:
        return []
    rows, ends = figures.get("rows") or 0, figures.get("robust_accuracy") or {}
    spent = total(figures)
    signs = (run.figures("checklist") or {}).get("signs")
    raised = sum(bool(sign.get("raised")) for sign in signs or [])
    measured = sum(sign.get("measure") is not None for sign in signs or [])
    each = number(spent / rows, 1) if rows else MISSING
    trust = "the checklist was not measured" if signs is None else f"of {measured} signs measured"
    return [
        Card(
            "robust accuracy",
            span(ends.get("lower"), ends.get("upper")),
            f"{threat_name(run.plan)}, {count(rows)} images" + "; not complete" * (not figures.get("complete")),
        ),
        Card("clean accuracy", percent(figures.get("clean_accuracy")), "the same images, untouched"),
        Card("forward and backward passes per image", each, f"{count(spent)} in all", "attack"),
        Card(
            "warnings",
            MISSING if signs is None else count(raised),
            trust,
            "model" if measured > raised == 0 else "attack",
        ),
    ]
