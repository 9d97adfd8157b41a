"""Attacks carried over: success on the surrogates that they saw, and on the target that they did not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes

from sparring.auditing.run import Run
from sparring.reporting import charts
from sparring.reporting.attack_table import passes
from sparring.reporting.gallery import triptychs
from sparring.reporting.markup import Chart, bar, chart, heading, join, paragraph, table
from sparring.reporting.wording import confidence, count, duration, number, percent

ORDER = 65
TITLE = "Attacks carried over"

Attacks = Sequence[Mapping[str, Any]]
_LEAD = (
    "No attack here saw the target. Each ran to its last step on the surrogates, and the target was asked once about "
    "every image that came of it. Success is the share of the images that it named right before."
)
_SIDES = (("surrogate", "on the surrogates"), ("target", "on the target"))
_SQUARE = Markup('<path d="M10 2h14v10h-14z" fill="currentColor"/>')


def render(run: Run) -> str | None:
    """The table, bars for both sides, and a gallery chosen by a stated rule."""
    figures = run.figures("transfer")
    if not figures:
        return None
    attacks, held = figures.get("attacks") or [], figures.get("held") or 0
    surrogates = ", ".join(figures.get("surrogates") or ["surrogates not recorded"])
    setting = (
        f"{count(held)} of {count(figures.get('rows'))} images of {figures.get('data', 'a data set not recorded')}, "
        f"from {surrogates} to {figures.get('model', 'a target not recorded')}, "
        f"threat model {figures.get('threat', 'not recorded')}."
    )
    ranked = [attack for attack in attacks if attack.get("target") is not None]
    if ranked:
        best = max(ranked, key=lambda attack: attack["target"])
        setting += f" {best.get('name')} travels best, with {percent(best['target'])}."
    parts = [paragraph(_LEAD, "lead"), paragraph(setting, "finding"), _table(attacks, held), _chart(ranked)]
    if gallery := triptychs(run, "transfer"):
        rule = str(figures.get("rule", "the rule was not recorded"))
        parts += [heading("Clean, change, adversarial"), paragraph(f"Which rows are shown: {rule}."), gallery]
    return join(parts)


def _table(attacks: Attacks, held: int) -> Markup:
    """One attack a line."""
    head = ("attack", "on the surrogates", "on the target", "passes per image")
    lines = [
        (
            attack.get("name", "unnamed"),
            *(bar(attack.get(side), percent(attack.get(side))) for side, _ in _SIDES),
            number(passes(attack, held), 1),
            number(attack.get("mean_linf"), 3),
            number(attack.get("mean_l2")),
            confidence(attack.get("confidence")),
            duration(attack.get("seconds")),
        )
        for attack in attacks
    ]
    return table("The attacks", (*head, "mean Linf", "mean L2", "mean confidence", "time"), lines)


def _chart(attacks: Attacks) -> Markup:
    """Two bars an attack; nothing when there is none."""
    if not attacks:
        return Markup()
    rows = [(attack.get("name", "unnamed"), *(percent(attack.get(side)) for side, _ in _SIDES)) for attack in attacks]
    told = [f"{name}: {first} on the surrogates, {then} on the target" for name, first, then in rows]
    size = (5.0, 0.8 + 0.42 * len(attacks))
    return chart(
        Chart(
            title="Success here and there",
            alt=f"Success of each attack. {'; '.join(told)}.",
            svg=charts.svg("transfer", lambda axes: _draw(axes, attacks), size),
            head=("attack", *(words for _, words in _SIDES)),
            rows=rows,
            legend=_legend(),
        )
    )


def _legend() -> Markup:
    """Which bar is which."""
    lines = [
        Markup(
            '<li><svg viewBox="0 0 35 14" aria-hidden="true" style="color:var(--series-{})">{}</svg>{}</li>'
        ).format(place + 1, _SQUARE, words)
        for place, (_, words) in enumerate(_SIDES)
    ]
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(lines))


def _draw(axes: Axes, attacks: Attacks) -> None:
    """Bars from the left, the first attack on top, the surrogates above the target."""
    for place, (side, _) in enumerate(_SIDES):
        lengths = [attack.get(side) or 0.0 for attack in attacks]
        heights = [index + 0.36 * (place - 0.5) for index in range(len(attacks))]
        axes.barh(heights, lengths, height=0.34, color=charts.series(place).colour)
    axes.set_yticks(range(len(attacks)), [str(attack.get("name", "unnamed")) for attack in attacks])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.02)
    axes.grid(axis="y", visible=False)
    charts.percent_axis(axes, "success", "x")
