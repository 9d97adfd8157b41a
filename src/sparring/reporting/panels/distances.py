"""Robust accuracy at every eps, from the smallest change found for each image, and how large these are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes

from sparring.auditing.distances import share_at
from sparring.auditing.run import Run
from sparring.reporting import charts
from sparring.reporting.markup import Chart, block, chart, heading, join, paragraph
from sparring.reporting.wording import MISSING, count, percent, plain

ORDER = 81
TITLE = "The smallest changes"

Figures = Mapping[str, Any]
_LEAD = (
    "For every image that the model gets right when it is untouched, attacks that minimise looked for the smallest "
    "change that makes it err. The share of images whose change is larger than eps is robust accuracy at eps, "
    "for every eps at once."
)
_LINE = "smallest found by any attack here"
_SHOWN = 12  # lines of the curve's table


def render(run: Run) -> str | None:
    """The curve and the histogram, and what kind of figures they are."""
    found = (run.figures("audit") or {}).get("distances")
    if not found:
        return None
    plan = run.plan
    norm, audited = str(plan.get("norm", "")), plan.get("eps")
    why = block("why", heading("How to read it"), *(paragraph(line) for line in _reading(found, norm, audited)))
    parts = [paragraph(_LEAD, "lead"), block("pair aside", _curve(found, norm, audited), why)]
    if found.get("histogram"):
        parts.append(_histogram(found, norm, audited))
    return join(parts)


def _reading(found: Figures, norm: str, audited: float | None) -> list[str]:
    """What kind of figures these are, and those to quote."""
    told = [
        "Every point of the curve is an upper bound on the truth: an attack that is not among these may find a "
        "smaller change, and none can make a distance found here larger. Each has its image on disk, judged again "
        "from there."
    ]
    quantiles = ", ".join(f"{percent(float(at), 0)} at {_length(far)}" for at, far in found["quantiles"].items())
    if found["median"] is None:
        told.append(f"Fewer than half of the images have fallen. Shares that have: {quantiles}.")
    else:
        told.append(
            f"Half of all images have fallen at {norm} {plain(found['median'])} (the median; those that are wrong "
            f"when untouched count with 0). Shares that have fallen by then: {quantiles}."
        )
    if audited is not None:
        told.append(
            f"At the audited eps {plain(audited)} it is {percent(share_at(found['curve'], audited))}, the upper end "
            "of the verdicts."
        )
    if found["none_found"]:
        told.append(f"For {count(found['none_found'])} images no change was found; they count as holding at any eps.")
    return told


def _length(distance: float | None) -> str:
    return MISSING if distance is None else plain(float(f"{distance:.4g}"))


def _curve(found: Figures, norm: str, audited: float | None) -> Markup:
    """The steps, the audited eps, and where half have fallen."""
    curve, median = found["curve"], found["median"]
    eps, shares = curve["eps"], curve["robust_accuracy"]
    places = sorted({round(k * (len(eps) - 1) / max(1, _SHOWN - 1)) for k in range(_SHOWN)} | {0, len(eps) - 1})
    told = ", ".join(f"{percent(shares[place])} at eps {_length(eps[place])}" for place in places)
    marks = [charts.mark("M17.5 1.5v11", "the audited eps")] if audited is not None else []
    marks += [charts.mark("M1 7h33", "half of the images", 1.5, 0.5)] if median is not None else []
    return chart(
        Chart(
            title=f"Robust accuracy over eps in {norm}, upper bounds",
            alt=f"Robust accuracy over eps, {_LINE}: {told}.",
            svg=charts.svg("distances", lambda axes: _draw(axes, eps, shares, audited, median)),
            head=("eps", "robust accuracy from there on (upper bound)"),
            rows=[(_length(eps[place]), percent(shares[place])) for place in places],
            legend=charts.legend([_LINE], *marks),
            note="Eps 0 is clean accuracy. Only some steps are listed; rows.csv has the distance of every image.",
        )
    )


def _draw(
    axes: Axes, eps: Sequence[float], shares: Sequence[float], audited: float | None, median: float | None
) -> None:
    """A line of steps; the audited eps upright, and a level line to where half have fallen."""
    end = 1.05 * max(eps[-1], audited or 0.0) or 1.0
    axes.step([*eps, end], [*shares, shares[-1]], where="post", color=charts.series(0).colour)
    axes.set(xlim=(0, end), ylim=(-0.03, 1.04), xlabel="eps")
    charts.percent_axis(axes, "robust accuracy (upper bound)")
    if audited is not None:
        axes.axvline(audited, color=charts.INK, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        _say(axes, f"audited: eps {plain(audited)}", audited / end)
    if median is not None:
        axes.plot([0, median, median], [0.5, 0.5, -0.03], color=charts.MUTED, linewidth=1.0, zorder=1)
        axes.plot([median], [0.5], color=charts.INK, marker="o", markersize=6)


def _say(axes: Axes, words: str, place: float) -> None:
    """Words above the axes, at this share of their width."""
    axes.annotate(
        words,
        (place, 1.0),
        xycoords="axes fraction",
        xytext=(0, 4),
        textcoords="offset points",
        ha="center",
        color=charts.INK,
        fontsize=charts.FONT - 1,
    )


def _histogram(found: Figures, norm: str, audited: float | None) -> Markup:
    """How many images have a smallest change of each size."""
    edges, rows = found["histogram"]["edges"], found["histogram"]["rows"]
    bins = list(zip(edges, edges[1:], rows, strict=False))
    told = ", ".join(f"{count(held)} from {_length(low)} to {_length(high)}" for low, high, held in bins if held)
    found_by = ", ".join(f"{name} {count(held)}" for name, held in found["found_by"].items())

    def draw(axes: Axes) -> None:
        axes.bar(
            edges[: len(rows)],
            rows,
            width=[high - low for low, high, _ in bins],
            align="edge",
            color=charts.series(0).colour,
            edgecolor=charts.CARD,
        )
        if audited is not None:
            axes.axvline(audited, color=charts.INK, linewidth=1.2, linestyle=(0, (4, 3)))
            axes.set_xlim(0, max(edges[-1], 1.05 * audited))
        axes.set(xlabel=f"smallest {norm} distance found", ylabel="images")

    return chart(
        Chart(
            title="Images by the smallest change found",
            alt=f"Images by their smallest distance: {told}.",
            svg=charts.svg("reach", draw),
            head=("from", "to", "images"),
            rows=[(_length(low), _length(high), count(held)) for low, high, held in bins],
            note=f"Only images that are right when untouched. Found by: {found_by}.",
        )
    )
