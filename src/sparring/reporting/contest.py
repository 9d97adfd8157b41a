"""The charts of a comparison: robust accuracy over eps for each attack, and distance against cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from sparring.auditing.run import Run
from sparring.reporting import charts
from sparring.reporting.attack_table import passes
from sparring.reporting.markup import Chart
from sparring.reporting.wording import norm_name, number, percent, plain

Figures = Mapping[str, Any]
DRAWN = 6  # lines that an eye can tell apart
BEST = "best of all, row by row"
_FAINT = 0.25
_STEP = 8  # of the grid, between two figures in the table


def drawings(run: Run) -> dict[str, Chart]:
    """The charts of the section `attack` by name; none where fewer than two attacks were compared."""
    figures = run.figures("attack") or {}
    if len(figures.get("attacks") or []) < 2 or len((figures.get("curve") or {}).get("eps") or []) < 2:
        return {}
    found = {"security": security(figures)}
    return found | ({"front": front(figures)} if len(_placed(figures)) > 1 else {})


def write_drawings(run: Run) -> None:
    """Each chart as an SVG file of its own beside the report."""
    for name, drawn in drawings(run).items():
        run.write(f"{name}.svg", charts.standalone(drawn.svg).encode())


def leaders(figures: Figures) -> list[int]:
    """The places of the attacks that come nearest to the best of all."""
    scores = [attack.get("optimality") for attack in figures["attacks"]]
    order = sorted(range(len(scores)), key=lambda place: -1.0 if scores[place] is None else -scores[place])
    return [place for place in order if scores[place] is not None][:DRAWN]


def security(figures: Figures) -> Chart:
    """Robust accuracy over eps under each of the leading attacks, and under the best of all."""
    curve, attacks, norm = figures["curve"], figures["attacks"], norm_name(figures.get("norm"))
    shown = leaders(figures)
    names = [str(attacks[place]["name"]) for place in shown]
    lines = {name: curve["attacks"][place] for name, place in zip(names, shown, strict=True)} | {BEST: curve["best"]}
    at = [*range(0, len(curve["eps"]), _STEP), len(curve["eps"]) - 1]
    alt = "; ".join(f"{name}: {', '.join(percent(shares[i]) for i in at)}" for name, shares in lines.items())
    return Chart(
        title=f"Robust accuracy over eps ({norm}), upper bounds",
        alt=f"Robust accuracy over eps at {', '.join(plain(curve['eps'][i]) for i in at)}. {alt}.",
        svg=charts.svg("security", lambda axes: _draw_security(axes, curve["eps"], lines, norm)),
        head=("attack", *(f"eps {curve['eps'][i]:.3g}" for i in at)),
        rows=[(name, *(percent(shares[i]) for i in at)) for name, shares in lines.items()],
        legend=charts.legend(names, charts.mark("M1 7h33", BEST, 7, _FAINT)),
        note="Eps 0 is clean accuracy. A row counts as robust at eps while nothing nearer was found.",
    )


def _draw_security(axes: Axes, eps: Sequence[float], lines: Mapping[str, Sequence[float]], norm: str) -> None:
    for place, (name, shares) in enumerate(lines.items()):
        if name == BEST:
            axes.plot(eps, shares, color=charts.INK, linewidth=7, alpha=_FAINT, solid_capstyle="round", zorder=1.5)
        else:
            charts.series(place).plot(axes, eps, shares)
    axes.set(ylim=(-0.03, 1.04), xlabel=f"eps ({norm})")
    charts.percent_axis(axes, "robust accuracy (upper bound)")


def _placed(figures: Figures) -> list[tuple[float, float, str, bool, float]]:
    """Of each attack that broke at least half of the rows: passes, median, name, whether on the front, success."""
    rows = figures.get("rows") or 0
    return sorted(
        (spent, float(attack["median"]), str(attack["name"]), bool(attack.get("front")), float(attack["success"]))
        for attack in figures["attacks"]
        if (spent := passes(attack, rows)) and attack.get("median") is not None
    )


def front(figures: Figures) -> Chart:
    """Median distance against passes; those that no other attack beats stand out."""
    points, norm = _placed(figures), norm_name(figures.get("norm"))
    told = [f"{name}: median {median:.3g} with {spent:,.1f} passes" for spent, median, name, _, _ in points]
    best = charts.mark("M17.5 2.6l4.4 4.4-4.4 4.4-4.4-4.4z", "on the front")
    return Chart(
        title=f"Median distance ({norm}) against cost",
        alt=f"Median distance over passes per image. {'; '.join(told)}.",
        svg=charts.svg("front", lambda axes: _draw_front(axes, points, norm)),
        head=("attack", "passes per image", f"median {norm}", "success", "on the front"),
        rows=[
            (name, number(spent, 1), number(median, 4), percent(success), "yes" if ahead else "no")
            for spent, median, name, ahead, success in points
        ],
        legend=charts.legend((), best, charts.mark("M15 7h5", "the others", 5, 0.7)),
        note="Attacks that broke fewer than half of the images have no median and are not drawn.",
    )


def _draw_front(axes: Axes, points: Sequence[tuple[float, float, str, bool, float]], norm: str) -> None:
    """Named diamonds for those on the front, small dots for the others."""
    for spent, far, _, ahead, _ in points:
        colour, marker, size = (charts.series(1).colour, "D", 8) if ahead else (charts.MUTED, "o", 5)
        axes.plot(spent, far, linestyle="none", color=colour, marker=marker, markersize=size)
    axes.set_xlim(points[0][0] / 1.8, points[-1][0] * 2.5)
    axes.set_ylim(0, 1.15 * max(median for _, median, *_ in points))
    charts.log_axis(axes, "x", "forward and backward passes per image")
    axes.set_ylabel(f"median {norm} distance")
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]  # settles the layout the names are placed in
    charts.name_points(axes, [point[:3] for point in points if point[3]])
