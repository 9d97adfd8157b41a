"""Which stage decided which images, and what each cost."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup
from matplotlib.axes import Axes

from sparring.auditing.run import Run
from sparring.reporting import charts
from sparring.reporting.audited import After, Figures, passes, progress, total
from sparring.reporting.markup import Chart, block, chart, heading, join, paragraph, table
from sparring.reporting.wording import MISSING, count, duration, number, percent

ORDER = 82
TITLE = "Who decided"

_LEAD = (
    "First come cheap attacks, on every image that holds or on a few for a trial; then rounds dig deeper into those "
    "that came closest to an error. A round of n gives each of its images n more tries. A pass is one image through "
    "the network, forward or backward."
)
_NEAREST = (
    "Stages called nearest come last: on every image that is right when untouched they look for the smallest change, "
    "and one within the audited eps breaks an image that held."
)
_PROOFS = (
    "Stages called proof compute bounds, without a pass through the network: what they prove is never attacked, and "
    "what is left goes on."
)
_READING = (
    "A curve that is level at its end says that more of the same would break little more; one that still falls "
    "there says that the upper end has not settled. Level is no proof: an attack of another kind may break more."
)


def render(run: Run) -> str | None:
    """The stages in their order, and robust accuracy as it fell."""
    figures = run.figures("audit")
    if not figures or not figures.get("stages"):
        return None
    lead = f"{_LEAD} {_NEAREST}" if figures.get("distances") else _LEAD
    lead = f"{lead} {_PROOFS}" if figures.get("proofs") else lead
    parts = [paragraph(lead, "lead"), paragraph(_finding(figures), "finding"), _table(figures)]
    reached = progress(figures)
    if len(reached) > 1:
        why = block("why", heading("How to read it"), paragraph(_READING))
        parts.append(block("pair aside", _chart(reached), why))
    return join(parts)


def _finding(figures: Figures) -> str:
    """Who broke most, and what all of it cost."""
    rows, spent = figures.get("rows") or 0, total(figures)
    best = max(figures["stages"], key=lambda stage: stage.get("broken") or 0)
    broken = sum(stage.get("broken") or 0 for stage in figures["stages"])
    told = "No stage broke an image. "
    if broken:
        told = (
            f"{best.get('name')} (stage {best.get('stage')}) broke {count(best['broken'])} of the {count(broken)}. "
        )
        told = told[0].upper() + told[1:]
    each = f", {number(spent / rows, 1)} per image" if rows else ""
    return f"{told}All stages together took {count(spent)} passes{each}, and {duration(figures.get('seconds'))}."


def _table(figures: Figures) -> Markup:
    """One stage a line, then what belongs to none, then what was spent beside the verdicts."""
    proving = bool(figures.get("proofs"))
    head = ["stage", "images met", "broken", "forward", "backward", "time", "passes per image broken"]
    if proving:
        head.insert(3, "proved")
    lines: list[Sequence[object]] = []
    proved: list[str] = []
    for stage in figures["stages"]:
        broken = stage.get("broken") or 0
        lines.append(
            (
                f"{stage.get('stage')}. {stage.get('name')}",
                count(stage.get("rows")),
                count(broken),
                count(stage.get("forward")),
                count(stage.get("backward")),
                duration(stage.get("seconds")),
                number(passes(stage) / broken, 1) if broken else MISSING,
            )
        )
        proved.append(count(stage.get("certified")))
    lost = [
        (figures.get(f"{way}_passes") or 0) - sum(stage.get(way) or 0 for stage in figures["stages"])
        for way in ("forward", "backward")
    ]
    if any(lost):
        lines.append(("a stage not finished", MISSING, MISSING, *map(count, lost), MISSING, MISSING))
    for name, part in (figures.get("also_spent") or {}).items():
        spent = (count(part.get("forward")), count(part.get("backward")), duration(part.get("seconds")))
        lines.append((f"beside the verdicts: {name}", MISSING, MISSING, *spent, MISSING))
    if proving:
        proved += [MISSING] * (len(lines) - len(proved))
        lines = [(*line[:3], told, *line[3:]) for line, told in zip(lines, proved, strict=True)]
    return table("The stages", head, lines)


def _chart(reached: Sequence[After]) -> Markup:
    """The upper end of robust accuracy over the passes spent."""
    told = [f"{percent(one.upper)} after stage {one.number} at {number(one.passes, 1)} passes" for one in reached]
    return chart(
        Chart(
            title="Robust accuracy, upper end, over passes spent",
            alt=f"The upper end of robust accuracy over passes per image: {', '.join(told)}.",
            svg=charts.svg("stages", lambda axes: _draw(axes, reached)),
            head=("stage", "what", "passes per image so far", "upper end after it"),
            rows=[(one.number, one.name, number(one.passes, 1), percent(one.upper)) for one in reached],
            note="Each point is the end of a stage, with its number.",
        )
    )


def _draw(axes: Axes, reached: Sequence[After]) -> None:
    """A line through the ends of the stages, each with its number where there is room for it."""
    x, y = [one.passes for one in reached], [one.upper for one in reached]
    axes.plot(x, y, color=charts.series(1).colour, marker="o")
    axes.set(xlim=(0, 1.05 * x[-1]), ylim=(-0.03, 1.1))
    axes.set_yticks([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    charts.count_axis(axes, "forward and backward passes per image")
    charts.percent_axis(axes, "not broken so far")
    last = -x[-1]
    for one in reached:
        if one.passes - last >= 0.04 * x[-1]:
            place, last = (one.passes, one.upper), one.passes
            axes.annotate(
                str(one.number),
                place,
                xytext=(1, 6),
                textcoords="offset points",
                color=charts.INK,
                fontsize=charts.FONT - 1,
            )
