"""The page: a shell, and every panel the run has something for."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from sparring.auditing.run import Run
from sparring.core.files import write_atomic
from sparring.reporting import headline

_STYLES = ("theme.css", "page.css", "figures.css", "audit.css", "defenses.css", "print.css")


@dataclass(frozen=True)
class Panel:
    """One module under `panels`."""

    name: str
    order: int
    title: str
    render: Callable[[Run], str | None]


def write_report(run: Run) -> Path:
    """Write `report.html`, one file that opens offline, from the run's plan and evidence alone."""
    from sparring.reporting.contest import write_drawings  # matplotlib is slow to load

    write_drawings(run)
    path = run.path / "report.html"
    write_atomic(path, _page(run).encode())
    return path


def _panels() -> list[Panel]:
    """Every panel in the folder, in the order of the page."""
    package = importlib.import_module("sparring.reporting.panels")
    found = []
    for entry in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{entry.name}")
        found.append(Panel(entry.name, module.ORDER, module.TITLE, module.render))
    return sorted(found, key=lambda panel: (panel.order, panel.name))


def _page(run: Run) -> str:
    """The whole page as text."""
    folder = files("sparring.reporting")
    sections = [
        {"name": panel.name, "title": panel.title, "body": Markup(body)}
        for panel in _panels()
        if (body := panel.render(run)) is not None
    ]
    shell = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    plan = run.plan
    return shell.from_string((folder / "page.html").read_text()).render(
        title=headline.title(plan),
        summary=headline.summary(plan),
        kind=plan.get("kind", "run"),
        version=(plan.get("versions") or {}).get("sparring", ""),
        cards=headline.cards(run),
        duel=headline.picture_pair(run),
        sections=sections,
        style=Markup("\n".join((folder / name).read_text() for name in _STYLES)),
    )
