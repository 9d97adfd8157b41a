"""Class by class: which classes fall, and what they are taken for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes

from sparring.auditing.intervals import clopper_pearson
from sparring.auditing.run import Run
from sparring.reporting import charts
from sparring.reporting.markup import Chart, block, chart, details, heading, join, paragraph, table
from sparring.reporting.wording import MISSING, class_namer, count, percent, span

ORDER = 83
TITLE = "Class by class"

Entries = Sequence[Mapping[str, Any]]
_WIDE = 16  # classes; of more, the heat map has the width of the page
_LONGEST = 16  # letters of a class name in the chart; the table has all of them


def render(run: Run) -> str | None:
    """What broken images are taken for, and the accuracy of every class."""
    figures = run.figures("audit")
    if not figures or not figures.get("classes"):
        return None
    lead = (
        "First: what the model says of the images that were broken. Then: the share of each class that it gets "
        "right untouched, and the share that was not broken, an upper bound on robust accuracy."
    )
    classes, confusion = figures["classes"], figures.get("confusion")
    style = "stacked" if len(confusion or []) > _WIDE else "pair aside"
    return join([paragraph(lead, "lead"), block(style, _heat(run, confusion), _chart(classes))])


def _heat(run: Run, confusion: Sequence[Sequence[int]] | None) -> Markup:
    """[true class][class named] as a table whose cells are the darker, the more images they count."""
    title = heading("From what it is to what the model says")
    if confusion is None:
        return block("matrix", title, paragraph("Too many classes to draw; rows.csv has every pair.", "note"))
    name = class_namer(run.plan)
    pairs = sorted(
        ((hits, source, goal) for source, row in enumerate(confusion) for goal, hits in enumerate(row) if hits),
        key=lambda pair: (-pair[0], *pair[1:]),
    )
    if not pairs:
        return block("matrix", title, paragraph("No image was broken.", "note"))
    most, source, goal = pairs[0]
    told = f"Most often {name(source)} is taken for {name(goal)}: {count(most)} of {count(sum(p[0] for p in pairs))}."
    lines = [(f"{name(source)} → {name(goal)}", count(hits)) for hits, source, goal in pairs]
    return block(
        "matrix heat",
        title,
        paragraph("Row: the true class. Column: what the model says of the adversarial image.", "axis"),
        _cells(name, confusion, most, told),
        paragraph(told, "axis"),
        details("The figures", table("Broken images by class", ("from → to", "images"), lines)),
    )


def _cells(name: Any, confusion: Sequence[Sequence[int]], most: int, told: str) -> Markup:
    """The heat map itself, with its numbers."""
    size = len(confusion)
    names = [name(label) for label in range(size)]
    longest = max(map(len, names))
    turned = " class=turned" if longest > 3 else ""
    top = join(Markup('<th scope="col" title="{0}"><span>{0}</span></th>').format(word) for word in names)
    lines = []
    for source, row in enumerate(confusion):
        cells = [
            Markup('<td class="same"></td>')
            if source == goal and not hits
            else Markup('<td style="--heat:{:.0f}%" title="{} → {}">{}</td>').format(
                8 + 47 * hits / most if hits else 0, names[source], names[goal], hits or ""
            )
            for goal, hits in enumerate(row)
        ]
        lines.append(Markup('<tr><th scope="row" title="{0}">{0}</th>{1}</tr>').format(names[source], join(cells)))
    return Markup(
        '<div class="scroll" role="region" aria-label="Counts of broken images by true class and class named. {}" '
        'tabindex="0"><table{} style="--classes:{};--name:{:.1f}rem"><thead><tr><td aria-hidden="true"></td>{}</tr>'
        "</thead><tbody>{}</tbody></table></div>"
    ).format(told, Markup(turned), size, 0.8 + 0.5 * min(longest, 20), top, join(lines))


def _clean(entry: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """The share of a class that is right untouched, with its interval."""
    share, rows = entry.get("clean"), entry.get("rows") or 0
    return None if share is None or not rows else (share, *clopper_pearson(round(share * rows), rows))


def _upper(entry: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """The share of a class that was not broken, with its interval."""
    share, ends = entry.get("upper"), entry.get("interval")
    return None if share is None or not ends else (share, ends[0], ends[1])


def _with_interval(point: tuple[float, float, float] | None) -> str:
    return MISSING if point is None else f"{percent(point[0])} ({span(*point[1:])})"


def _chart(classes: Entries) -> Markup:
    """A dot and its whisker for each class, untouched and under attack."""
    told = [
        f"{entry.get('class')} {percent(entry.get('clean'))} and {percent(entry.get('upper'))}" for entry in classes
    ]
    worst = min(classes, key=lambda entry: entry.get("upper") or 0.0)
    proved = any(entry.get("certified") for entry in classes)
    head = ("class", "images", "clean accuracy (95 %)", *["certified"] * proved, "not broken (95 %)")
    lines = [
        (
            entry.get("class"),
            count(entry.get("rows")),
            _with_interval(_clean(entry)),
            *[percent(entry.get("certified"))] * proved,
            _with_interval(_upper(entry)),
        )
        for entry in classes
    ]
    return chart(
        Chart(
            title="Accuracy of each class, clean and not broken",
            alt=f"Accuracy of each class, clean and not broken: {'; '.join(told)}.",
            svg=charts.svg("classes", lambda axes: _draw(axes, classes), (5.0, 1.0 + 0.3 * len(classes))),
            head=head,
            rows=lines,
            legend=charts.legend(("clean", "not broken (upper bound)")),
            note=f"Least is left of {worst.get('class')}: {_with_interval(_upper(worst))}. "
            "Whiskers: 95 % Clopper-Pearson intervals; a class of few images has long ones.",
        )
    )


def _draw(axes: Axes, classes: Entries) -> None:
    """Classes from top to bottom, in the order of their labels."""
    for turn, points in ((0, [_clean(entry) for entry in classes]), (1, [_upper(entry) for entry in classes])):
        style, lift = charts.series(turn), (-0.14, 0.14)[turn]
        for place, point in enumerate(points):
            if point is None:
                continue
            share, low, high = point
            axes.plot([low, high], [place + lift] * 2, color=style.colour, linewidth=1.6, alpha=0.65)
            axes.plot([share], [place + lift], color=style.colour, marker=style.marker, linestyle="none")
    names = [str(entry.get("class")) for entry in classes]
    names = [name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…" for name in names]
    axes.set_yticks(range(len(classes)), names)
    axes.set(ylim=(len(classes) - 0.5, -0.5), xlim=(-0.03, 1.03))
    charts.percent_axis(axes, "share of the images of a class", "x")
    axes.grid(visible=False, axis="y")
