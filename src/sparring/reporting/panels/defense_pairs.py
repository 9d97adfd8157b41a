"""Naive against adaptive: what each defense seems to hold, and what it does."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup
from matplotlib.axes import Axes

from sparring.auditing.run import Run
from sparring.defending.finding import HIDES
from sparring.reporting import charts
from sparring.reporting.defended import Row, about, between, ends, link, name, rows, share, short, shown
from sparring.reporting.markup import Chart, block, chart, heading, join, paragraph, table

ORDER = 67
TITLE = "Naive against adaptive"

_LEAD = (
    "The same images, attacked by who ignores the defense and by who knows it. What lies between the two bars is not "
    "robustness: those images fall as soon as somebody looks at how the defense works."
)
_READING = (
    "The naive attack is what most defenses were first reported under. It says nothing about robustness, and stands "
    "here only to show how much of it was an illusion. The whisker is the adaptive figure's interval for all such "
    "images (95 %)."
)
_SWATCH = Markup('<li><span class="swatch {}"></span>{}</li>')
_TALL = 0.36  # of a bar, of the room that a defense has


def render(run: Run) -> str | None:
    """The pairs of bars, and the differences as a table."""
    found = shown(rows(run))
    if not found:
        return None
    why = block("why", heading("How to read it"), paragraph(_READING), _widest(found))
    return join([paragraph(_LEAD, "lead"), block("pair aside", _chart(found), why)])


def _widest(found: Sequence[Row]) -> Markup:
    """Where naive and adaptive differ most, with the interval of the difference."""
    ordered = sorted(found, key=lambda row: row["adaptive"] - row["naive"])
    lines = [
        (link(row), share(row["naive"] - row["adaptive"]), between(ends_of_illusion(row)))
        for row in ordered
        if row["naive"] > row["adaptive"]
    ]
    if not lines:
        return paragraph("Nothing here seemed to hold that does not.")
    hidden = [name(row) for row in ordered if row.get("finding") == HIDES]
    told = f"Found to hide the gradient: {', '.join(hidden) or 'none'}."
    head = ("defense", "fell only adaptively", "95 % interval")
    return join([paragraph(told), table("What only seemed to hold", head, lines)])


def ends_of_illusion(row: Row) -> tuple[float, float] | None:
    """The interval of what held naively and fell adaptively, recorded as [value, low, high]."""
    found = (about(row).get("intervals") or {}).get("illusion")
    return (found[1], found[2]) if found else None


def _chart(found: Sequence[Row]) -> Markup:
    told = [f"{name(row)}: {share(row['naive'])} naive, {share(row['adaptive'])} adaptive" for row in found]
    legend = charts.legend(
        (),
        _SWATCH.format("naive", "under the naive attack"),
        _SWATCH.format("adaptive", "under the adaptive attack (upper bound)"),
    )
    return chart(
        Chart(
            title="Accuracy under attack, naive and adaptive",
            alt=f"Pairs of bars, a pair a defense. {'; '.join(told)}.",
            svg=charts.svg("defense_pairs", lambda axes: _draw(axes, found), (5.0, 0.9 + 0.42 * len(found))),
            head=("defense", "naive", "adaptive", "adaptive, 95 % interval", "difference"),
            rows=[
                (
                    name(row),
                    share(row["naive"]),
                    share(row["adaptive"]),
                    between(ends(row)),
                    share(row["naive"] - row["adaptive"]),
                )
                for row in found
            ],
            legend=legend,
        )
    )


def _draw(axes: Axes, found: Sequence[Row]) -> None:
    """An open bar over a full one for each defense, from the top down."""
    for place, row in enumerate(found):
        axes.barh(place - _TALL / 2, row["naive"], _TALL, color="none", edgecolor=charts.MUTED, linewidth=1.2)
        axes.barh(place + _TALL / 2, row["adaptive"], _TALL, color=charts.series(0).colour)
        low, high = ends(row) or (row["adaptive"],) * 2
        axes.plot([low, high], [place + _TALL / 2] * 2, color=charts.INK, linewidth=1.5, marker="|", markersize=6)
        for value, at, colour in ((row["naive"], -_TALL / 2, charts.MUTED), (high, _TALL / 2, charts.INK)):
            figure = row["naive"] if at < 0 else row["adaptive"]
            axes.annotate(
                share(figure),
                (value, place + at),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                color=colour,
                fontsize=charts.FONT - 2,
            )
    axes.set(xlim=(0, 1.16), ylim=(len(found) - 0.4, -0.6), xticks=(0, 0.25, 0.5, 0.75, 1))
    axes.set_yticks(range(len(found)), [short(row) for row in found], color=charts.INK)
    axes.grid(visible=False, axis="y")
    charts.percent_axis(axes, "accuracy under attack", "x")
