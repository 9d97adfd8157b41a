"""How sure the model was of the broken images, before and after."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from sparring.auditing.run import Run
from sparring.core.verdict import Verdict
from sparring.reporting import charts
from sparring.reporting.markup import Chart, block, chart, join, paragraph
from sparring.reporting.wording import count, percent

ORDER = 85
TITLE = "Confidence"

_SIDES = {"before": "of the true class, untouched", "after": "of the wrong class, adversarial"}
_SHARES = [place / 10 for place in range(10)]


def render(run: Run) -> str | None:
    """Two histograms in tenths."""
    figures = run.figures("audit") or {}
    held = {side: (figures.get("confidence") or {}).get(side) or [] for side in _SIDES}
    if not any(map(any, held.values())):
        return None
    broken = (figures.get("counts") or {}).get(Verdict.BROKEN)
    sure = {side: sum(hits[9:]) / sum(hits) if sum(hits) else None for side, hits in held.items()}
    told = (
        f"The {count(broken)} broken images, by the probability that the model gives to the class it names. At 90 % "
        f"or more: {percent(sure['before'])} of them before the attack, {percent(sure['after'])} after it."
    )
    note = (
        "The attacks stop at the first error they find, and do not seek a confident one: low figures after the "
        "attack do not say that confident errors are not there."
    )
    top = max(max(hits, default=0) for hits in held.values())
    drawn = [_histogram(place, side, held[side], top) for place, side in enumerate(_SIDES) if held[side]]
    return join([paragraph(told, "finding"), block("pair", *drawn), paragraph(note, "note")])


def _histogram(place: int, side: str, hits: Sequence[int], top: int) -> Markup:
    """One histogram; both have the same scale."""
    tenths = [f"{10 * tenth} to {10 * tenth + 10} %" for tenth in range(len(hits))]
    told = [f"{number} at {tenth}" for tenth, number in zip(tenths, hits, strict=True) if number]
    return chart(
        Chart(
            title=f"{side.capitalize()} the attack",
            alt=f"Broken images by confidence {side} the attack: {', '.join(told) or '0'}.",
            svg=charts.svg(f"confidence-{side}", lambda axes: _draw(axes, place, side, hits, top), (5.0, 2.5)),
            head=("confidence", "images"),
            rows=list(zip(tenths, map(count, hits), strict=True)),
        )
    )


def _draw(axes: Axes, place: int, side: str, hits: Sequence[int], top: int) -> None:
    """Bars with their counts."""
    x = _SHARES[: len(hits)]
    bars = axes.bar(x, hits, width=0.092, align="edge", color=charts.series(place).colour, alpha=(1.0, 0.8)[place])
    axes.bar_label(bars, [str(n) if n else "" for n in hits], padding=2, color=charts.INK, fontsize=charts.FONT - 1)
    axes.set(xlim=(-0.01, 1.01), ylim=(0, 1.15 * top), ylabel="images")
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.grid(visible=False, axis="x")
    axes.tick_params(axis="x", pad=7)
    charts.percent_axis(axes, f"confidence {_SIDES[side]}", "x")
