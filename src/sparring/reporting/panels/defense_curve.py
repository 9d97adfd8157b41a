"""Robust accuracy over eps of all defenses on one chart, with what was measured at the eps of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes

from sparring.auditing.run import Run
from sparring.core.showing import number_of
from sparring.defending.finding import REFERENCE
from sparring.reporting import charts
from sparring.reporting.defended import Row, about, called, name, rows, share
from sparring.reporting.markup import Chart, block, chart, heading, join, paragraph
from sparring.reporting.wording import count, norm_name, plain

ORDER = 70
TITLE = "Defenses over eps"

_LEAD = (
    "A defense that holds falls as eps grows, and at an eps that allows any image it has fallen. A line that stays "
    "up there says that the attacks were stopped, not that the images are robust."
)
_READING = (
    "Each line is the worst of a few quick attacks that know the defense, scaled to its clean accuracy. They are "
    "upper bounds: the adaptive attack searched longer, and on all images. Where its figure is known, a dash of the "
    "line's colour marks it at the eps of the run: quote that, not the line."
)
_FAINT = 0.25
DRAWN = 6  # lines that an eye can tell apart


@dataclass(frozen=True)
class Line:
    """One defense over eps."""

    name: str
    called: str  # where there is less room
    eps: Sequence[float]
    shares: Sequence[float]
    rows: int
    adaptive: float | None
    reference: bool

    @property
    def points(self) -> dict[float, float]:
        """Shares by eps."""
        return dict(zip(self.eps, self.shares, strict=True))


def render(run: Run) -> str | None:
    """The chart, and how far to trust it."""
    found = [line for row in rows(run) if (line := _line(row)) is not None]
    if not found:
        return None
    eps = run.plan.get("eps")
    told = [f"Drawn on {_few(found)} that each defense gets right.", _READING]
    if len(_leaders(found)) < len([line for line in found if not line.reference]):
        told.append(f"The first {DRAWN} of the ranking have colours; the table under the chart has all.")
    why = block("why", heading("How to read it"), *map(paragraph, told))
    return join([paragraph(_LEAD, "lead"), block("pair aside", _chart(found, eps, run.plan), why)])


def _line(row: Row) -> Line | None:
    """What the row has of it, if that is anything."""
    drawn = about(row).get("curve") or {}
    eps, worst = drawn.get("eps") or [], drawn.get("worst") or []
    if not eps or len(eps) != len(worst):
        return None
    reference = about(row).get("role") == REFERENCE
    return Line(name(row), called(row), eps, worst, int(drawn.get("rows") or 0), row.get("adaptive"), reference)


def _few(found: Sequence[Line]) -> str:
    least, most = min(line.rows for line in found), max(line.rows for line in found)
    return number_of(most, "image") if least == most else f"{count(least)} to {number_of(most, 'image')}"


def _leaders(found: Sequence[Line]) -> list[Line]:
    """The first of the ranking that are no reference."""
    return [line for line in found if not line.reference][:DRAWN]


def _chart(found: Sequence[Line], at: float | None, plan: Mapping[str, Any]) -> Markup:
    """Leaders in colours, the undefended net as a wide line, the others faint; all of them in the table."""
    leaders = _leaders(found)
    grid = sorted({eps for line in found for eps in line.eps})
    others = [line for line in found if line not in leaders and not line.reference]
    told = [
        f"{line.name}: " + ", ".join(f"{share(value)} at eps {plain(eps)}" for eps, value in line.points.items())
        for line in found
    ]
    marks = [charts.mark("M1 7h33", line.called, 7, _FAINT) for line in found if line.reference]
    marks += [charts.mark("M1 7h33", number_of(len(others), "other"), 1, 0.5)] if others else []
    norm = norm_name(plan.get("norm", "the run's norm"))
    return chart(
        Chart(
            title=f"Robust accuracy over eps ({norm}), upper bounds",
            alt=f"Robust accuracy over eps. {'; '.join(told)}.",
            svg=charts.svg("defense_curve", lambda axes: _draw(axes, found, at, f"eps ({norm})"), (5.0, 3.8)),
            head=("defense", *(f"eps {plain(eps)}" for eps in grid)),
            rows=[(line.name, *(share(line.points.get(eps)) for eps in grid)) for line in found],
            legend=charts.legend([line.called for line in leaders], *marks),
            note="Eps 0 is clean accuracy.",
        )
    )


def _draw(axes: Axes, found: Sequence[Line], at: float | None, label: str) -> None:
    """All lines, and the measured figures of those in colour."""
    leaders = _leaders(found)
    for line in found:
        if line.reference:
            axes.plot(line.eps, line.shares, color=charts.INK, linewidth=7, alpha=_FAINT, zorder=1.5)
        elif line not in leaders:
            axes.plot(line.eps, line.shares, color=charts.MUTED, linewidth=1, alpha=0.6, zorder=1.6)
    for place, line in enumerate(leaders):
        style = charts.series(place)
        style.plot(axes, line.eps, line.shares)
        if at is not None and line.adaptive is not None:
            axes.plot(at, line.adaptive, color=style.colour, marker="_", markersize=16, markeredgewidth=3, zorder=3)
    axes.set(ylim=(-0.03, 1.04), xlabel=label)
    charts.percent_axis(axes, "robust accuracy (upper bound)")
    if at is None:
        return
    axes.axvline(at, color=charts.MUTED, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        f"measured: eps {plain(at)}", (at, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 4), ha="center",
        textcoords="offset points", color=charts.INK, fontsize=charts.FONT - 1,
    )  # fmt: skip
