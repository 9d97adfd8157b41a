"""`sparring ls`: what there is."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from sparring import catalog
from sparring.cli import options
from sparring.cli.show import Show
from sparring.core.losses import LOSSES
from sparring.core.threat import NORMS, Unbounded
from sparring.data import summaries
from sparring.models.nets import NETS


def command(json: options.Json = False) -> None:
    """List attacks, defenses, nets, data sets, norms and losses."""
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
    data = [{"name": name, "summary": summary} for name, summary in summaries().items()]
    nets = [{"name": name, "summary": _first_line(build)} for name, build in NETS.items()]
    _table(show, "Attacks", attacks)
    _table(show, "Defenses", defenses)
    _table(show, "Nets", nets)
    _table(show, "Data sets (also: an .npz file, a folder)", data)
    show.say(f"norms: {', '.join([*NORMS, Unbounded.norm])}; losses: {', '.join(LOSSES)}")
    show.result(
        {
            "attacks": attacks,
            "defenses": defenses,
            "nets": nets,
            "data": data,
            "norms": [*NORMS, Unbounded.norm],
            "losses": list(LOSSES),
        }
    )


def _options(kind: Any) -> dict[str, Any]:
    """The options of a class with their defaults; None where one must be given."""
    return {f.name: None if f.default is MISSING else f.default for f in fields(kind)}


def _first_line(build: Any) -> str:
    return (build.__doc__ or "").strip().splitlines()[0]


def _table(show: Show, title: str, entries: list[dict[str, Any]]) -> None:
    head = [key for key in entries[0] if key != "options"]
    show.table(title, head, [[_cell(entry[key]) for key in head] for entry in entries], words=True)


def _cell(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)
