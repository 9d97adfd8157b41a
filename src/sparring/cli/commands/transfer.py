"""`sparring transfer`: craft images on surrogates, and see how many fool a model that no attack has seen."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from torch import Tensor

from sparring import catalog
from sparring.auditing.plan import common
from sparring.auditing.run import Run
from sparring.cli import options
from sparring.cli.show import Show
from sparring.core.showing import figure, percent, rounded
from sparring.core.threat import threat
from sparring.data import Images, load
from sparring.data.images import to_bytes
from sparring.models.spec import Named
from sparring.reporting import write_report
from sparring.transferability import FAMILY, Transfer, transfer

SHOWN = 12


def command(
    target: Annotated[str, typer.Argument(help="The model to fool, in any form that `sparring attack` takes.")],
    surrogate: Annotated[list[str], typer.Option("--surrogate", help="A model to craft on; several are fused.")],
    attack: Annotated[
        list[str] | None, typer.Option("--attack", help=f"May be repeated [default: {', '.join(FAMILY)}].")
    ] = None,
    data: options.Data = None,
    norm: options.Norm = "linf",
    eps: options.Eps = None,
    eight_bit: Annotated[bool, typer.Option("--eight-bit", help="Carry images as 8-bit files hold them.")] = False,
    width: options.Width = None,
    max_queries: options.MaxQueries = None,
    data_dir: options.DataDir = None,
    limit: options.Limit = None,
    seed: options.Seed = 0,
    device: options.DeviceName = "auto",
    out: options.Out = None,
    json: options.Json = False,
) -> None:
    """Attack each --surrogate, or all of them as one, and ask TARGET once about every image that comes of it."""
    show, where, names = Show(json), options.device(device), attack or list(FAMILY)
    limits = threat(norm, options.radius(norm, eps))
    settings = {
        "attacks": {name: repr(catalog.attack(name)) for name in names},
        "threat": limits.describe(),
        "eight_bit": eight_bit,
        "width": width,
    }
    victim = options.victim(target, where, max_queries)
    stand_ins = [options.victim(each, where, None) for each in surrogate]
    images = load(options.dataset(data, victim), data_dir, on_status=show.say).test.take(limit)
    plan = {
        "model": victim.name,
        "model_digest": victim.digest,
        "surrogates": {each.name: each.digest for each in stand_ins},
        "data": images.name,
        "rows": {"test": len(images)},
        "settings": settings,
        **common(images, seed, where),
    }
    run = Run.create(out, "transfer", plan)
    with options.counted(show, victim, run.path), show.progress():
        found = transfer(
            [each.model for each in stand_ins],
            victim.model,
            images.x.to(where),
            images.y.to(where),
            names,
            limits,
            sample=images.ids.to(where),
            seed=seed,
            eight_bit=eight_bit,
            width=width,
            tell=show.tick,
        )
    _finish(show, run, victim, stand_ins, images, found)


def _finish(show: Show, run: Run, victim: Named, stand_ins: list[Named], images: Images, found: Transfer) -> None:
    figures: dict[str, Any] = {
        "rows": len(images),
        "held": found.held,
        "model": victim.name,
        "surrogates": [each.name for each in stand_ins],
        "data": images.name,
        "threat": found.entries[0].threat,
        "clean_accuracy": rounded((found.outcomes[0].clean_label.cpu() == images.y).double().mean().item()),
        "worst_case_accuracy": rounded(found.robust_accuracy),
        "attacks": found.figures(),
    }
    shown, tensors = _gallery(images, found)
    figures |= {"rule": "the first test images that the attack that travels best carried over", "shown": shown}
    for place, outcome in enumerate(found.outcomes):
        tensors |= {f"{place}_images": outcome.best.cpu(), f"{place}_found": outcome.found.cpu()}
    run.record("transfer", figures, tensors)
    run.write_result()
    report = write_report(run)
    _table(show, figures)
    for entry in found.entries:
        if entry.failed:
            show.say(f"{entry.name}: {entry.failed} rows that a model could not answer for count as neither")
    show.say(f"accuracy under the worst of them, an upper bound: {percent(figures['worst_case_accuracy'])}")
    show.say(f"report: {report}")
    show.result(figures | {"report": str(report), "run": str(run.path), "queries": options.queries(victim)})


def _gallery(images: Images, found: Transfer) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """A few of the images that fooled the target, and what it said of each."""
    best = max(found.outcomes, key=lambda outcome: -outcome.robust_accuracy)
    fell = (best.found & ~best.clean).cpu().nonzero().squeeze(1)[:SHOWN]
    shown = [
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
    return shown, {"x": to_bytes(images.x[fell]), "adversarial": to_bytes(best.best.cpu()[fell])}


def _table(show: Show, figures: dict[str, Any]) -> None:
    show.table(
        f"{', '.join(figures['surrogates'])} -> {figures['model']}, {figures['threat']}: success among the "
        f"{figures['held']} of {figures['rows']} rows of {figures['data']} that the target names right",
        ["attack", "surrogate", "target", "Linf", "L2", "confidence", "passes/row", "seconds"],
        [
            [
                e["name"],
                percent(e["surrogate"]),
                percent(e["target"]),
                figure(e["mean_linf"]),
                figure(e["mean_l2"]),
                percent(e["confidence"]),
                figure((e["forward"] + e["backward"]) / figures["held"], 1),
                figure(e["seconds"], 2),
            ]
            for e in figures["attacks"]
        ],
    )
