"""A person sees one class, the network names another: the classic method and the improved one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from torch import Tensor

from sparring.auditing.run import Run
from sparring.reporting import charts
from sparring.reporting.markup import Chart, block, chart, heading, join, paragraph
from sparring.reporting.pictures import picture
from sparring.reporting.wording import (
    brief_confidence,
    class_namer,
    confidence,
    net_name,
    number,
    percent,
    plain,
)

ORDER = 40
TITLE = "Targeted pairs"

Cells = Mapping[tuple[int, int], Mapping[str, Any]]
_METHODS = {"ddn": "DDN on the log-odds"}
_WAYS = ("classic", "improved")
_STALL = (
    "Softmax saturates. Where the network is almost certain of the source, or of a few wrong classes "
    "together, its output no longer moves, and the gradient of the quadratic cost all but vanishes. Near the "
    "goal it fades again, so that the pull towards the picture wins before the confidence is high enough. The "
    "log-odds do not saturate, and the improved method asks for the confidence first and then for the "
    "shortest change that keeps it."
)


def render(run: Run) -> str | None:
    """Both grids, what each reached, and the distance of each pair."""
    figures = run.figures("targeted")
    if not figures:
        return None
    ways = {way: figures[way] for way in _WAYS if figures.get(way)}
    lead = (
        f"Descent changes a test image until the {net_name(figures.get('net', 'network'))} names another "
        f"class with at least {_share(figures.get('threshold'))}, and keeps it close to where it began "
        f"(classic method: lambda = {plain(figures.get('lambda'))}). L2 is the length of the change, "
        "with pixels from 0 to 1. Every ordered pair of classes is tried."
    )
    parts = [paragraph(lead, "lead"), paragraph(_finding(figures, ways) + _named(figures), "finding")]
    tensors = run.tensors("targeted")
    grids = [_grid(run, _title(way, entry), _by_pair(entry), tensors.get(way)) for way, entry in ways.items()]
    parts.append(block("pair grids", *grids))
    stalled = [cell for cell in (ways.get("classic") or {}).get("cells") or [] if cell.get("reached") is False]
    parts.append(
        block(
            "pair aside",
            *_distances(run, ways),
            block("why", heading("Why the classic method stalls"), paragraph(_STALL)) if stalled else "",
        )
    )
    return join(parts)


def _share(value: float | None) -> str:
    """The threshold in percent, with the digits it was given in."""
    return percent(value) if value is None else f"{round(100 * value, 8):g} %"


def _title(way: str, entry: Mapping[str, Any]) -> str:
    """The name of a method: what it is called here, and what it is."""
    method = entry.get("method")
    return f"{way.capitalize()} ({_METHODS.get(method, method)})" if method else way.capitalize()


def _by_pair(entry: Mapping[str, Any]) -> Cells:
    """The cells of a method by source and goal."""
    return {(cell["source"], cell["goal"]): cell for cell in entry.get("cells") or []}


def _finding(figures: Mapping[str, Any], ways: Mapping[str, Mapping[str, Any]]) -> str:
    """Both methods in figures, and side by side where both succeed."""
    told: list[str] = []
    for way, entry in ways.items():
        at = f" pairs at ≥ {_share(figures.get('threshold'))}" if not told else ""
        mean = entry.get("mean_l2")
        where = " where it succeeds" if entry.get("reached") != entry.get("pairs") else ""
        length = "no mean L2, for no pair succeeds" if mean is None else f"mean L2 {number(mean)}{where}"
        told.append(f"{_title(way, entry)}: {entry.get('reached')} of {entry.get('pairs')}{at}, {length}.")
    one, other = (_by_pair(ways.get(way) or {}) for way in _WAYS)
    both = [pair for pair in one if one[pair].get("reached") and other.get(pair, {}).get("reached")]
    lengths = [[cells[pair]["l2"] for pair in both if cells[pair].get("l2") is not None] for cells in (one, other)]
    if both and len(lengths[0]) == len(lengths[1]) == len(both):
        first, second = (number(sum(values) / len(both)) for values in lengths)
        told.append(f"On the {len(both)} pairs that both reach: mean L2 {first} against {second}.")
    return " ".join(told)


def _named(figures: Mapping[str, Any]) -> str:
    """The same methods when it is enough that the network names the goal at all."""
    named = figures.get("named") or {}
    if not named.get("both_pairs"):
        return ""
    return (
        f" With no confidence asked for, the classic method gets {named.get('classic_pairs')} pairs named, "
        f"with a mean confidence of {confidence(named.get('classic_confidence'))}, and the improved one "
        f"{named.get('improved_pairs')}; on the {named['both_pairs']} that both get, mean L2 is "
        f"{number(named.get('classic_mean_l2'))} against {number(named.get('improved_mean_l2'))}."
    )


def _grid(run: Run, title: str, cells: Cells, images: Tensor | None) -> Markup:
    """Rows are what a person sees, columns what the network says."""
    size = len(images) if images is not None else 1 + max((max(pair) for pair in cells), default=-1)
    name = class_namer(run.plan)
    top = Markup("").join(Markup('<th scope="col" title="{0}">{0}</th>').format(name(goal)) for goal in range(size))
    longest = max((len(name(source)) for source in range(size)), default=1)
    lines = []
    for source in range(size):
        row = []
        for goal in range(size):
            image = None if images is None else images[source, goal]
            row.append(_cell(name, source, goal, cells.get((source, goal), {}), image))
        lines.append(Markup('<tr><th scope="row">{}</th>{}</tr>').format(name(source), join(row)))
    width = 0.7 + 0.55 * min(longest, 9)
    return Markup(
        '<div class="matrix"><h3>{}</h3>'
        '<p class="axis">Row: what a person sees. Column: what the network says.</p>'
        '<div class="scroll" role="region" aria-label="{}" tabindex="0">'
        '<table style="--classes:{};--name:{:.1f}rem"><thead><tr><td aria-hidden="true"></td>{}</tr></thead>'
        "<tbody>{}</tbody></table></div>{}</div>"
    ).format(title, title, size, width, top, join(lines), paragraph(_legend(cells), "axis"))


def _legend(cells: Cells) -> str:
    """How a cell that was not reached is marked, where there is one."""
    missed = sum(cell.get("reached") is False for cell in cells.values())
    if not missed:
        return "Solid frame: the source, unchanged."
    return f"Solid frame: the source, unchanged. Dashed and dimmed: not reached ({missed}), with its confidence."


def _cell(
    name: Callable[[object], str], source: int, goal: int, cell: Mapping[str, Any], image: Tensor | None
) -> Markup:
    """One pair: its image, and its confidence where the goal was not reached."""
    if source == goal:
        alt, style, mark = f"the source, a {name(source)}", "source", ""
    else:
        missed = cell.get("reached") is False
        sure = confidence(cell.get("confidence"))
        alt = f"a {name(source)}, read as {name(goal)} with {sure}{', not reached' * missed}"
        style, mark = "missed" * missed, brief_confidence(cell.get("confidence")) * missed
    shown = picture(image, alt) if image is not None else ""
    return Markup('<td class="{}"><span>{}<i>{}</i></span></td>').format(style, shown, mark)


def _distances(run: Run, ways: Mapping[str, Mapping[str, Any]]) -> list[Markup]:
    """L2 of each pair, classic against improved; nothing when one of them is missing."""
    one, other = (_by_pair(ways.get(way) or {}) for way in _WAYS)
    pairs = [
        (pair, one[pair], other[pair])
        for pair in one
        if pair in other and one[pair].get("l2") is not None and other[pair].get("l2") is not None
    ]
    if not pairs:
        return []
    name = class_namer(run.plan)
    both = [(first, second) for _, first, second in pairs if first.get("reached") and second.get("reached")]
    shorter = sum(second["l2"] < first["l2"] for first, second in both)
    verdict = f"Of the {len(both)} pairs that both reach, the improved change is the shorter one in {shorter}."
    verdict = verdict if both else "A pair that stalled has not arrived, so its length is no achievement."
    rows = [
        (
            f"{name(pair[0])} → {name(pair[1])}",
            number(first["l2"]),
            _outcome(first),
            number(second["l2"]),
            _outcome(second),
        )
        for pair, first, second in pairs
    ]
    classic_reached = sum(bool(first.get("reached")) for _, first, _ in pairs)
    improved_reached = sum(bool(second.get("reached")) for _, _, second in pairs)
    drawn = Chart(
        title="L2 of each pair",
        alt=(
            f"L2 of each pair, classic against improved. Classic reaches {classic_reached} of {len(pairs)}, "
            f"improved {improved_reached}. {verdict}"
        ),
        svg=charts.svg("targeted", lambda axes: _draw(axes, [(first, second) for _, first, second in pairs])),
        head=("pair", "classic L2", "confidence", "improved L2", "confidence"),
        rows=rows,
        note=f"Below the dashed line the improved change is the shorter one. {verdict}",
    )
    return [chart(drawn)]


def _outcome(cell: Mapping[str, Any]) -> str:
    """The confidence got, and whether it was enough."""
    return confidence(cell.get("confidence")) + ", not reached" * (cell.get("reached") is False)


def _draw(axes: Axes, pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> None:
    """One point a pair: a disc where classic got there, a cross where it stalled."""
    longest = 1.08 * max(max(first["l2"], second["l2"]) for first, second in pairs) or 1.0
    axes.plot([0, longest], [0, longest], color=charts.MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
    for place, marker, label, wanted in (
        (0, "o", "classic reached it", True),
        (1, "x", "classic stalled", False),
    ):
        points = [(first["l2"], second["l2"]) for first, second in pairs if bool(first.get("reached")) is wanted]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, linestyle="none", marker=marker, color=charts.series(place).colour, label=label)
    axes.set(
        xlim=(0, longest),
        ylim=(0, longest),
        xlabel="L2 of the classic change",
        ylabel="L2 of the improved one",
    )
    axes.legend(loc="upper left", frameon=False, borderaxespad=0.2, handletextpad=0.2)
