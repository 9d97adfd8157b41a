"""Charts as inline SVG whose colours are the page's own, so that they follow light and dark."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

_NAMES = ("ink", "muted", "line", "card", *(f"series-{place}" for place in range(1, 7)))
_SENTINELS = {name: f"#5a{17 * place:02x}e7" for place, name in enumerate(_NAMES)}
INK, MUTED, LINE, CARD = (_SENTINELS[name] for name in _NAMES[:4])
FONT = 12.0
_STYLE: dict[Any, Any] = {  # its keys are typed in some releases of matplotlib only
    "svg.fonttype": "none",
    "svg.hashsalt": "sparring",
    "text.parse_math": False,  # a name with a dollar sign is a name
    "font.size": FONT,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 2.0,
    "lines.markersize": 5.5,
}


@dataclass(frozen=True)
class Series:
    """How one line is drawn: by colour, by dashes and by marker, so that any one of them is enough."""

    colour: str
    dashes: tuple[float, ...]
    marker: str
    place: int

    def plot(self, axes: Axes, x: Sequence[float], y: Sequence[float]) -> None:
        """Draw the line, with about ten markers."""
        (line,) = axes.plot(x, y, color=self.colour, marker=self.marker, markevery=max(1, len(x) // 10))
        if self.dashes:
            line.set_dashes(self.dashes)


_DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2), (9, 3), (3, 1.5))
_MARKERS = "os^DvP"


def series(place: int) -> Series:
    """The style of the n-th line."""
    place %= 6
    return Series(_SENTINELS[f"series-{place + 1}"], _DASHES[place], _MARKERS[place], place)


_SHAPES = {
    "o": "M14 7a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z",
    "s": "M14.3 3.8h6.4v6.4h-6.4z",
    "^": "M17.5 3l4 7h-8z",
    "D": "M17.5 2.6l4.4 4.4-4.4 4.4-4.4-4.4z",
    "v": "M17.5 11l4-7h-8z",
    "P": "M16 3h3v2.5h2.5v3H19V11h-3V8.5h-2.5v-3H16z",
}


def legend(names: Iterable[str], *marks: Markup) -> Markup:
    """The lines and their names, then what else is marked, above the chart, where long names may wrap."""
    entries = []
    for place, name in enumerate(names):
        style = series(place)
        entries.append(
            Markup(
                '<li><svg viewBox="0 0 35 14" aria-hidden="true" style="color:var(--series-{})">'
                '<path d="M1 7h33" stroke="currentColor" stroke-width="2" stroke-dasharray="{}"/>'
                '<path d="{}" fill="currentColor"/></svg>{}</li>'
            ).format(
                style.place + 1,
                " ".join(f"{2 * dash:g}" for dash in style.dashes) or "none",
                _SHAPES[style.marker],
                name,
            )
        )
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join([*entries, *marks]))


def mark(shape: str, name: str, width: float = 2.5, opacity: float = 1.0) -> Markup:
    """One more entry of a legend: something drawn in ink, with the path of its symbol in a box of 35 by 14."""
    return Markup(
        '<li><svg viewBox="0 0 35 14" aria-hidden="true" style="color:var(--ink)">'
        '<path d="{}" fill="none" stroke="currentColor" stroke-width="{:g}" stroke-opacity="{:g}"/></svg>{}</li>'
    ).format(shape, width, opacity, name)


def svg(key: str, draw: Callable[[Axes], None], size: tuple[float, float] = (5.0, 3.2)) -> Markup:
    """Draw on fresh axes of `size` inches and return the SVG; `key` sets its ids apart from other charts'."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's fonts draw the text
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=size, dpi=72, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return Markup(_inline(key, buffer.getvalue()))


def _inline(key: str, text: str) -> str:
    """An SVG file as a part of an HTML page: own ids, the page's colours and fonts, no namespaces."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<(defs|metadata)>\s*<style.*?</style>\s*</\1>|<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.S)
    text = re.sub(r' (xmlns(:\w+)?|version)="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 aria-hidden="true"', text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r'\bid="', f'id="{key}-', text)
    text = re.sub(r'(?:xlink:)?href="#', f'href="#{key}-', text)
    text = text.replace("url(#", f"url(#{key}-")
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    text = re.sub(r"font-family: [^;\"]*; ", "", text)
    for name, sentinel in _SENTINELS.items():
        text = text.replace(sentinel, f"var(--{name})")
    return text.strip()


def standalone(drawn: Markup) -> str:
    """A chart of a page as an SVG file of its own, in the colours of the light page."""
    light = (files("sparring.reporting") / "theme.css").read_text().split("@media")[0]
    text = str(drawn).replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif"', 1)
    for name, colour in re.findall(r"--([\w-]+): (#\w+);", light):
        text = text.replace(f"var(--{name})", colour)
    return text


def percent_axis(axes: Axes, label: str, which: str = "y") -> None:
    """Read the y or x axis as a share in percent."""
    axes.set(**{f"{which}label": label})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.4g} %"))


def count_axis(axes: Axes, label: str) -> None:
    """Read the x axis as a few whole numbers."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def log_axis(axes: Axes, which: str, label: str) -> None:
    """Make the x or y axis logarithmic, with plain figures at its ticks."""
    axes.set(**{f"{which}scale": "log", f"{which}label": label})
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1,) if high > 200 * low else (1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"))


def name_points(axes: Axes, points: Iterable[tuple[float, float, str]]) -> None:
    """Write each point's name beside it, where no other name or point is in the way."""
    places = [(axes.transData.transform((x, y)), text) for x, y, text in points]
    taken = [(x - 4, y - 4, x + 4, y + 4) for (x, y), _ in places]
    frame = axes.get_window_extent()
    for (x, y), text in places:
        width, height = 0.6 * FONT * len(text), 1.1 * FONT
        boxes = [_box(x, y, width, height, turn) for turn in range(10)]
        inside = [box for box in boxes if frame.x0 <= box[0] and box[2] <= frame.x1 and frame.y0 <= box[1]]
        free = [box for box in inside if not any(_overlap(box, other) for other in taken)]
        box = (free or inside or boxes)[0]
        taken.append(box)
        axes.annotate(
            text,
            (box[0], box[1]),
            xycoords="figure pixels",
            color=INK,
            fontsize=FONT - 1,
            annotation_clip=False,
        )


def _box(x: float, y: float, width: float, height: float, turn: int) -> tuple[float, float, float, float]:
    """The n-th place for a name near (x, y): right, left, below, above, then ever further below."""
    left = (x + 7, x - 7 - width, x - width / 2, x - width / 2)[min(turn, 3)]
    lift = (-height / 2 + 2, -height / 2 + 2, -height - 6, 8)[turn] if turn < 4 else -height * (turn - 2) - 6
    return left, y + lift, left + width, y + lift + height


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Do two boxes share any point?"""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
