"""`sparring attack`: attack a model on test images, and keep what was found."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer

from sparring import catalog
from sparring.auditing.plan import common
from sparring.auditing.run import Run
from sparring.cli import options
from sparring.cli.show import Show
from sparring.comparison import Comparison, compare
from sparring.core.attack import Attack
from sparring.core.errors import UsageError
from sparring.core.showing import figure, percent, rounded
from sparring.core.threat import Threat, Unbounded, threat
from sparring.data import Images, load
from sparring.data.images import to_bytes
from sparring.models.spec import Named
from sparring.reporting import write_report

SHOWN = 12


def command(
    model: Annotated[str, typer.Argument(help="A checkpoint, a .onnx or .keras file, a URL, or file.py:function.")],
    attack: Annotated[list[str], typer.Option("--attack", help="Such as pgd:steps=10; may be repeated.")],
    data: options.Data = None,
    norm: Annotated[
        str | None, typer.Option("--norm", help=f"{options.NORMS} [default: the attack's first].")
    ] = None,
    eps: options.Eps = None,
    target: Annotated[str | None, typer.Option("--target", help="A class number, or next.")] = None,
    confidence: Annotated[float, typer.Option("--confidence", help="What the model must give its answer.")] = 0.0,
    restarts: Annotated[int, typer.Option("--restarts", min=1)] = 1,
    eight_bit: Annotated[bool, typer.Option("--eight-bit", help="Judge images as 8-bit files hold them.")] = False,
    width: options.Width = None,
    max_queries: options.MaxQueries = None,
    data_dir: options.DataDir = None,
    limit: options.Limit = None,
    seed: options.Seed = 0,
    device: options.DeviceName = "auto",
    out: options.Out = None,
    json: options.Json = False,
) -> None:
    """Attack MODEL on the test images of --data; every image found is stored and judged again."""
    show, where = Show(json), options.device(device)
    chosen = {text: catalog.attack(text) for text in attack}
    limits = _threat(norm, eps, list(chosen.values()))
    victim = options.victim(model, where, max_queries)
    images = load(options.dataset(data, victim), data_dir, on_status=show.say).test.take(limit)
    goal = _goal(target, images, any(a.needs_target for a in chosen.values()))
    settings: dict[str, Any] = {
        "attacks": {text: repr(a) for text, a in chosen.items()},
        "threat": limits.describe(),
        "target": target,
    }
    how = {"confidence": confidence, "restarts": restarts, "eight_bit": eight_bit, "width": width}
    run = Run.create(out, "attack", _plan(victim, images, settings | how, seed, where))
    with options.counted(show, victim, run.path), show.progress():
        found = compare(
            victim.model,
            images.x.to(where),
            images.y.to(where),
            list(chosen),
            limits,
            sample=images.ids.to(where),
            target=None if goal is None else goal.to(where),
            seed=seed,
            tell=show.tick,
            **how,
        )
    _finish(show, run, victim, images, found, goal is not None)


def _threat(norm: str | None, eps: float | None, attacks: list[Attack]) -> Threat:
    """What was asked for, or else what the first attack works in: without --eps, no bound if it needs none."""
    if norm is None:
        free = eps is None and all(Unbounded.norm in attack.norms for attack in attacks)
        norm = Unbounded.norm if free else attacks[0].norms[0]
    return threat(norm, options.radius(norm, eps))


def _goal(target: str | None, images: Images, needed: bool) -> torch.Tensor | None:
    if target is None and not needed:
        return None
    if target in (None, "next"):
        return (images.y + 1) % len(images.classes)
    if not target.isdigit() or int(target) >= len(images.classes):
        raise UsageError(f"expected --target from 0 to {len(images.classes) - 1}, or next, got {target!r}")
    return torch.full_like(images.y, int(target))


def _plan(victim: Named, images: Images, settings: dict[str, Any], seed: int, where: str) -> dict[str, Any]:
    return {
        "model": victim.name,
        "model_digest": victim.digest,
        "data": images.name,
        "rows": {"test": len(images)},
        "settings": settings,
        **common(images, seed, where),
    }


def _finish(show: Show, run: Run, victim: Named, images: Images, found: Comparison, targeted: bool) -> None:
    entries, outcomes = found.entries, found.outcomes
    figures: dict[str, Any] = {
        "rows": len(images),
        "model": victim.name,
        "data": images.name,
        "threat": entries[0].threat,
        "clean_accuracy": rounded((outcomes[0].clean_label.cpu() == images.y).double().mean().item()),
        "targeted": targeted,
        "worst_case_accuracy": None if targeted else rounded(found.robust_accuracy),
        "attacks": found.figures(),
    }
    best = outcomes[max(range(len(entries)), key=lambda i: entries[i].success or 0.0)]
    fell = (best.found & ~best.clean).cpu().nonzero().squeeze(1)[:SHOWN]
    figures["rule"] = "the first test images that fell to the strongest attack here"
    figures["shown"] = [
        {
            "label": int(images.y[i]),
            "prediction": int(best.clean_label[i]),
            "confidence": rounded(float(best.clean_confidence[i])),
            "adversarial_prediction": int(best.label[i]),
            "adversarial_confidence": rounded(float(best.confidence[i])),
            "distance": rounded(float(best.distance[i])),
        }
        for i in fell.tolist()
    ]
    tensors = {"x": to_bytes(images.x[fell]), "adversarial": to_bytes(best.best.cpu()[fell])}
    for i, outcome in enumerate(outcomes):
        tensors |= {
            f"{i}_images": outcome.best.cpu(),
            f"{i}_found": outcome.found,
            f"{i}_label": outcome.label,
        }
    run.record("attack", figures, tensors)
    run.write_result()
    report = write_report(run)
    _table(show, figures)
    unconfirmed = sum(entry.unconfirmed for entry in entries)
    if unconfirmed:
        show.say(f"not counted: {unconfirmed} images that fooled the model once and, judged again, did not: rounding")
    for entry in entries:
        if entry.failed:
            show.say(f"{entry.name}: {entry.failed} rows that the model could not answer for count as neither")
    if not targeted:
        show.say(f"accuracy under the worst of them, an upper bound: {percent(figures['worst_case_accuracy'])}")
    show.say(f"report: {report}")
    show.result(figures | {"report": str(report), "run": str(run.path), "queries": options.queries(victim)})


def _table(show: Show, figures: dict[str, Any]) -> None:
    show.table(
        f"{figures['model']} on {figures['rows']} rows of {figures['data']}: "
        f"clean accuracy {percent(figures['clean_accuracy'])}",
        ["attack", "success", "mean Linf", "mean L2", "confidence", "passes/row", "seconds"],
        [
            [
                e["name"],
                percent(e["success"]),
                figure(e["mean_linf"]),
                figure(e["mean_l2"]),
                percent(e["confidence"]),
                figure((e["forward"] + e["backward"]) / figures["rows"], 1),
                figure(e["seconds"], 2),
            ]
            for e in figures["attacks"]
        ],
    )
