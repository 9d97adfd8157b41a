"""`sparring defend`: which defenses hold against somebody who knows them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sparring.auditing.run import Run
from sparring.cli import options
from sparring.cli.show import Show
from sparring.core.errors import IncompleteError
from sparring.core.showing import number_of
from sparring.core.threat import threat
from sparring.data import load
from sparring.defending import Defended
from sparring.defending import defend as run_defend
from sparring.defending.defend import cells
from sparring.defending.plan import DEFAULT, split
from sparring.models.nets import NETS
from sparring.reporting import write_report

_DEFENSES = (
    "Recipes and guards, such as madry,jpeg:quality=50,smoothing+gaussian,file.py:Mine; see `sparring ls` "
    f"[default: {', '.join(DEFAULT)}]. The undefended net and the control bit_depth are always there."
)


def command(
    data: options.Data = "digits",
    net: Annotated[str, typer.Option("--net", help=f"One of {', '.join(NETS)}.")] = "conv",
    defenses: Annotated[list[str] | None, typer.Option("--defenses", help=_DEFENSES)] = None,
    norm: Annotated[str, typer.Option("--norm", help="linf, l2 or l1.")] = "linf",
    eps: options.Eps = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Of every training.")] = 2000,
    profile: Annotated[
        str, typer.Option("--profile", help="Of the adaptive attack: quick or standard.")
    ] = "standard",
    draws: Annotated[int, typer.Option("--draws", min=1, help="Of a random guard, for every answer.")] = 20,
    data_dir: options.DataDir = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Attack the first N test rows only.")] = None,
    seed: options.Seed = 0,
    device: options.DeviceName = "auto",
    out: options.Out = None,
    json: options.Json = False,
) -> None:
    """Train or wrap defenses, attack each knowingly, and say which hold; again with the same --out, go on."""
    show, where = Show(json), options.device(device)
    limits = threat(norm, options.radius(norm, eps))
    dataset = load(data or "digits", data_dir, on_status=show.say)
    wanted = None if defenses is None else [name for text in defenses for name in split(text)]
    folder = out or Run.place("defend")
    try:
        with show.progress():
            found = run_defend(
                dataset,
                limits,
                net=net,
                defenses=wanted,
                steps=steps,
                limit=limit,
                profile=profile,
                seed=seed,
                draws=draws,
                device=where,
                out=folder,
                tell=show.tick,
                say=show.say,
            )
    except IncompleteError:
        show.say(f"not complete: the same command with --out {folder} goes on")
        raise
    report = write_report(Run.open(found.run))
    _tell(show, found)
    show.say(f"report: {report}")
    show.result(found.figures | {"report": str(report)})


def _tell(show: Show, found: Defended) -> None:
    figures: dict[str, Any] = found.figures
    show.table(
        f"{figures['net']} on {number_of(figures['rows'], 'row')} of {figures['data']}, {figures['threat']}: "
        f"the attack that ignores the defense, and what knows it",
        ["defense", "clean", "naive -> adaptive", "proved", "training", "inference", "finding", "signs"],
        [_line(one) for one in found.rows],
    )
    for one in found.rows:
        show.say(f"{one['defense']}: {one['finding']}. {one['details']['sentence']}")
        if claimed := one["details"]["smoothed"]:
            show.say(f"  {claimed['sentence']}")
        for sign in one["signs"]:
            show.say(f"  sign: {sign}")
    for warning in figures["warnings"]:
        show.say(f"warning: {warning}")
    show.say("the adaptive figure is an upper bound on robust accuracy, and the naive one says nothing about it")


def _line(row: dict[str, Any]) -> list[str]:
    """A line of the table; a defense from a file goes by the file's name, so that the figures have room."""
    name, *figures = cells(row)
    return [name.rpartition("/")[2], *(figure.replace("→", "->") for figure in figures), str(len(row["signs"]))]
