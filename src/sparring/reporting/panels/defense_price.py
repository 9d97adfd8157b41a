"""What a defense gives against what it takes: clean accuracy, accuracy under the adaptive attack, and cost."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup
from matplotlib.axes import Axes

from sparring.auditing.run import Run
from sparring.defending.finding import REFERENCE
from sparring.reporting import charts
from sparring.reporting.defended import Row, link, name, rows, share, short, shown
from sparring.reporting.markup import Chart, block, chart, heading, join, paragraph, table
from sparring.reporting.wording import number

ORDER = 69
TITLE = "What it gives, and what it takes"

_LEAD = (
    "Up and to the right is better: more images right untouched, and more that hold against who knows the defense. "
    "What is larger costs more."
)
_READING = (
    "On the front are the defenses that no other beats: none has at least their clean accuracy and at least their "
    "accuracy under the adaptive attack, and more of either. Cost does not count for the front; it is the size. "
    "Numbers are places in the ranking."
)
_SWATCH = Markup('<li><span class="swatch {}"></span>{}</li>')
_LEGEND = (("disc", "cost of training"), ("ring", "cost of an answer"), ("ink", "undefended"))
Size = tuple[float, float]
Box = tuple[float, float, float, float]  # left, low, right, high
_LARGEST = 1000.0  # multiples of plain; what costs more is drawn as large as this


def render(run: Run) -> str | None:
    """The chart, and the front as a table."""
    found = shown(rows(run))
    if len(found) < 2:
        return None
    ahead = front(found)
    lines = [
        (link(row), share(row["clean"]), share(row["adaptive"]), _times(row, "training"), _times(row, "inference"))
        for row in ahead
    ]
    head = ("on the front", "clean", "adaptive", "training", "inference")
    why = block("why", heading("How to read it"), paragraph(_READING), table("The front", head, lines))
    return join([paragraph(_LEAD, "lead"), block("pair aside", _chart(found, ahead), why)])


def front(found: Sequence[Row]) -> list[Row]:
    """The rows that no other beats in clean and in adaptive accuracy."""
    return [row for row in found if not any(_beats(other, row) for other in found)]


def _beats(one: Row, other: Row) -> bool:
    mine, theirs = (one["clean"], one["adaptive"]), (other["clean"], other["adaptive"])
    return mine != theirs and all(a >= b for a, b in zip(mine, theirs, strict=True))


def _times(row: Row, what: str) -> str:
    return f"{number(row.get(f'{what}_cost'), 1)} ×"


def _chart(found: Sequence[Row], ahead: Sequence[Row]) -> Markup:
    told = [
        f"{name(row)}: clean {share(row['clean'])}, adaptive {share(row['adaptive'])}, training "
        f"{_times(row, 'training')}, inference {_times(row, 'inference')}"
        for row in found
    ]
    legend = charts.legend((), *(_SWATCH.format(*entry) for entry in _LEGEND))
    head = ("defense", "place", "clean", "adaptive", "training, × plain", "inference, × plain", "on the front")
    return chart(
        Chart(
            title="Clean accuracy against accuracy under the adaptive attack",
            alt=f"A point a defense. {'; '.join(told)}.",
            svg=charts.svg("defense_price", lambda axes: _draw(axes, found, ahead), (5.0, 4.3)),
            head=head,
            rows=[
                (
                    name(row),
                    place,
                    share(row["clean"]),
                    share(row["adaptive"]),
                    number(row.get("training_cost"), 1),
                    number(row.get("inference_cost"), 1),
                    "yes" if row in ahead else "no",
                )
                for place, row in enumerate(found, 1)
            ],
            legend=legend,
        )
    )


def width(cost: float | None) -> float:
    """The diameter of a cost in points: as much wider for each factor of ten."""
    return 7.0 + 8.0 * math.log10(min(max(cost or 1.0, 1.0), _LARGEST))


def _draw(axes: Axes, found: Sequence[Row], ahead: Sequence[Row]) -> None:
    """A disc and a ring a defense, largest first, and the steps of the front behind them."""
    steps = sorted((row["clean"], row["adaptive"]) for row in ahead)
    axes.step(*zip(*steps, strict=True), where="pre", color=charts.series(0).colour, linewidth=1.2, alpha=0.5)
    for row in sorted(found, key=lambda one: -(one.get("training_cost") or 1.0)):
        colour = charts.series(0).colour if row in ahead else charts.MUTED
        colour = charts.INK if row.get("finding") == REFERENCE else colour
        disc, ring = width(row.get("training_cost")), width(row.get("inference_cost"))
        at = row["clean"], row["adaptive"]
        alpha = 0.8 if colour == charts.INK else 0.35
        axes.plot(*at, marker="o", markersize=disc, color=colour, alpha=alpha, markeredgewidth=0, clip_on=False)
        axes.plot(*at, marker="o", markersize=ring, color=colour, markerfacecolor="none", clip_on=False)
    clean, adaptive = [row["clean"] for row in found], [row["adaptive"] for row in found]
    room = max(max(clean) - min(clean), 0.05)
    top = max(*adaptive, 0.1)
    axes.set(xlim=(min(clean) - 0.12 * room, max(clean) + 0.12 * room), ylim=(-0.3 * top, 1.2 * top))
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= 1.2 * top])
    charts.percent_axis(axes, "clean accuracy", "x")
    charts.percent_axis(axes, "under the adaptive attack (upper bound)")
    _sizes(axes)
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]  # settles the layout the names are placed in
    _place(axes, _labels(found, ahead))


def _labels(found: Sequence[Row], ahead: Sequence[Row]) -> list[tuple[float, float, str]]:
    """Places in the ranking, and of those on the front the names, which are longer and so find their place last."""
    named = [(row["clean"], row["adaptive"], short(row)) for row in ahead]
    return [
        *((row["clean"], row["adaptive"], str(place)) for place, row in enumerate(found, 1) if row not in ahead),
        *named,
    ]


def _place(axes: Axes, labels: Sequence[tuple[float, float, str]]) -> None:
    """Each label at the nearest free place around its point, with a line to it from farther away."""
    points = [axes.transData.transform((x, y)) for x, y, _ in labels]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    frame = axes.get_window_extent()
    for (x, y), (*_, text) in zip(points, labels, strict=True):
        wide, tall = 0.6 * charts.FONT * len(text) + 2, 1.1 * charts.FONT
        box = _free(x, y, (wide, tall), taken, (frame.x0, frame.y0, frame.x1, frame.y1))
        taken.append(box)
        middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        line = {"arrowstyle": "-", "color": charts.MUTED, "linewidth": 0.7, "shrinkB": 4}
        axes.annotate(
            text, (x, y), middle, xycoords="figure pixels", ha="center", va="center", color=charts.INK,
            fontsize=charts.FONT - 1, annotation_clip=False, arrowprops=line,
        )  # fmt: skip


def _free(x: float, y: float, size: Size, taken: Sequence[Box], frame: Box) -> Box:
    """The first box on growing rings around (x, y) that is in the frame and touches no other."""
    for ring in range(1, 9):
        for turn in range(16):
            angle = math.tau * turn / 16
            left = x + (6 + 7 * ring) * math.cos(angle) + (size[0] / 2) * (math.cos(angle) - 1)
            low = y + (6 + 7 * ring) * math.sin(angle) - size[1] / 2
            box = (left, low, left + size[0], low + size[1])
            inside = frame[0] <= box[0] and frame[1] <= box[1] and box[2] <= frame[2] and box[3] <= frame[3]
            if inside and not any(_touch(box, other) for other in taken):
                return box
    return (x + 7, y - size[1] / 2, x + 7 + size[0], y + size[1] / 2)


def _touch(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _sizes(axes: Axes) -> None:
    """Three sizes with what they mean, above the chart."""
    for left, cost in ((0.45, 1), (0.62, 10), (0.82, 100)):
        axes.plot(
            left, 1.08, transform=axes.transAxes, marker="o", markersize=width(cost), color=charts.MUTED, alpha=0.35,
            markeredgewidth=0, clip_on=False,
        )  # fmt: skip
        axes.annotate(
            f"{cost} ×", (left, 1.08), xycoords="axes fraction", xytext=(width(cost) / 2 + 4, 0), va="center",
            textcoords="offset points", color=charts.MUTED, fontsize=charts.FONT - 1,
        )  # fmt: skip
