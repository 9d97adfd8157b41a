"""What each attack reached and what it cost, as a table and as a chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes

from sparring.reporting import charts
from sparring.reporting.markup import Chart, bar, block, chart, heading, paragraph, table
from sparring.reporting.wording import MISSING, confidence, count, duration, number, percent

Attacks = Sequence[Mapping[str, Any]]
_READING = (
    "Up and to the left is better: more images broken for fewer passes. The dashed line is the best success "
    "that any attack here reached with that many passes. Passes, unlike seconds, are the same everywhere."
)


def passes(attack: Mapping[str, Any], rows: int) -> float | None:
    """Forward and backward passes per attacked image."""
    total: float = (attack.get("forward") or 0) + (attack.get("backward") or 0)
    return total / rows if total and rows else None


def attack_table(attacks: Attacks, rows: int) -> Markup:
    """One attack a line."""
    own = len({attack.get("threat") for attack in attacks}) > 1
    stored = any(attack.get("eight_bit") is not None for attack in attacks)
    head = ("attack", *["threat model"] * own, "success", "passes per image")
    head += ("mean Linf", "mean L2", *["as 8-bit files"] * stored, "mean confidence", "time")
    lines = [
        (
            attack.get("name", "unnamed"),
            *[attack.get("threat", MISSING)] * own,
            bar(attack.get("success"), percent(attack.get("success"))),
            number(passes(attack, rows), 1),
            number(attack.get("mean_linf"), 3),
            number(attack.get("mean_l2")),
            *[percent(attack.get("eight_bit"))] * stored,
            confidence(attack.get("confidence")),
            duration(attack.get("seconds")),
        )
        for attack in attacks
    ]
    return table("The attacks", head, lines)


def attack_chart(key: str, attacks: Attacks, rows: int) -> Markup:
    """Success against passes per image; nothing when fewer than two attacks say both."""
    points = [
        (spent, float(attack["success"]), str(attack.get("name", "unnamed")))
        for attack in attacks
        if (spent := passes(attack, rows)) and attack.get("success") is not None
    ]
    if len(points) < 2:
        return Markup()
    told = [f"{name}: {percent(success)} with {spent:,.1f} passes" for spent, success, name in points]
    figures = [
        (
            attack.get("name"),
            percent(attack.get("success")),
            count(attack.get("forward")),
            count(attack.get("backward")),
        )
        for attack in attacks
    ]
    drawn = chart(
        Chart(
            title="Success against cost",
            alt=f"Attack success over passes per image. {'; '.join(told)}.",
            svg=charts.svg(key, lambda axes: _draw(axes, sorted(points))),
            head=("attack", "success", "forward passes", "backward passes"),
            rows=figures,
        )
    )
    return block("pair aside", drawn, block("why", heading("How to read it"), paragraph(_READING)))


def _draw(axes: Axes, points: list[tuple[float, float, str]]) -> None:
    """Scatter the attacks, and step along the best of them."""
    x, y = [point[0] for point in points], [point[1] for point in points]
    best = [max(y[: place + 1]) for place in range(len(y))]
    axes.step(x, best, where="post", color=charts.MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
    style = charts.series(1)
    axes.plot(x, y, linestyle="none", color=style.colour, marker="D", markersize=7, markeredgecolor=charts.CARD)
    charts.log_axis(axes, "x", "forward and backward passes per image")
    charts.percent_axis(axes, "success")
    span = max(y) - min(y) or 0.1
    axes.set_ylim(max(min(y) - 0.35 * span, -0.03), min(max(y) + 0.15 * span, 1.04))
    axes.set_xlim(x[0] / 1.8, x[-1] * 2.5)
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]  # settles the layout the names are placed in
    charts.name_points(axes, points)
