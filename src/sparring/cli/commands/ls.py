"""`sparring ls`: what there is."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Annotated, Any

import typer

from sparring import catalog
from sparring.cli import options
from sparring.cli.show import Show
from sparring.comparison.budget import passes
from sparring.core.losses import LOSSES
from sparring.core.model import Access
from sparring.core.threat import NAMES
from sparring.data import summaries
from sparring.models.nets import NETS

_SEES = {Access.GRADIENT: "gradients", Access.SCORE: "scores", Access.DECISION: "labels"}
_PLAIN = (bool, int, float, str, type(None))  # what JSON can say
_TITLE = "# The attacks"
_NOTE = (
    "Passes: the most forward and backward passes that the default options spend on an image of 20 pixels in 4 "
    "classes; those of `deepfool`, `superdeepfool` and `jsma` grow with the classes or the pixels. A row that falls "
    "leaves at once, unless its attack looks for the nearest image. Written by `sparring ls --markdown`."
)


def command(
    json: options.Json = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Only the attacks, as docs/attacks.md has them.")
    ] = False,
) -> None:
    """List attacks, defenses, guards, nets, data sets, norms and losses."""
    if markdown:
        typer.echo(attack_table(), nl=False)
        return
    show = Show(json)
    attacks = [
        {
            "name": name,
            "access": kind.needs.name.lower(),
            "norms": list(kind.norms),
            "version": kind.version,
            "paper": kind.paper,
            "options": _options(kind),
        }
        for name, kind in catalog.attacks().items()
    ]
    defenses = [
        {"name": name, "version": kind.version, "paper": kind.paper, "options": _options(kind)}
        for name, kind in catalog.defenses().items()
    ]
    guards = [
        {
            "name": name,
            "version": kind.version,
            "differentiable": kind.differentiable,
            "randomised": kind.randomised,
            "detects": kind.detects,
            "paper": kind.paper,
            "options": _options(kind),
        }
        for name, kind in catalog.guards().items()
    ]
    data = [{"name": name, "summary": summary} for name, summary in summaries().items()]
    nets = [{"name": name, "summary": _first_line(build)} for name, build in NETS.items()]
    _table(show, "Attacks", attacks)
    _table(show, "Defenses", defenses)
    _table(show, "Guards (defenses at inference, and detectors)", guards)
    _table(show, "Nets", nets)
    _table(show, "Data sets (also: an .npz file, a folder)", data)
    show.say(f"norms: {', '.join(NAMES)}; losses: {', '.join(LOSSES)}")
    show.result(
        {
            "attacks": attacks,
            "defenses": defenses,
            "guards": guards,
            "nets": nets,
            "data": data,
            "norms": list(NAMES),
            "losses": list(LOSSES),
        }
    )


def attack_table() -> str:
    """Every attack in a Markdown table, with what its default options cost."""
    lines = [
        _TITLE,
        "",
        "| attack | sees | norms | looks for | target | passes | paper |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, kind in catalog.attacks().items():
        attack: Any = kind()
        cells = (
            f"`{name}`",
            _SEES[kind.needs],
            ", ".join(kind.norms),
            "the nearest" if attack.minimizes else "any within the radius",
            "always" if attack.needs_target else "if given",
            f"{passes(attack):,}",
            kind.paper,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _NOTE, ""])


def _options(kind: Any) -> dict[str, Any]:
    """The options of a class with their defaults; None where one must be given."""
    given = {f.name: None if f.default is MISSING else f.default for f in fields(kind)}
    return {key: value if isinstance(value, _PLAIN) else repr(value) for key, value in given.items()}


def _first_line(build: Any) -> str:
    return (build.__doc__ or "").strip().splitlines()[0]


def _table(show: Show, title: str, entries: list[dict[str, Any]]) -> None:
    head = [key for key in entries[0] if key != "options"]
    show.table(title, head, [[_cell(entry[key]) for key in head] for entry in entries], words=True)


def _cell(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)
