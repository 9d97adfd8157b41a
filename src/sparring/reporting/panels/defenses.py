"""Defenses side by side: ranked by what holds against who knows each, never by what holds against who does not."""

from __future__ import annotations

from markupsafe import Markup

from sparring.auditing.run import Run
from sparring.core.showing import number_of
from sparring.defending.defend import SECTION
from sparring.reporting.defended import Row, badge, between, claimed, ends, link, rows, sentence, share
from sparring.reporting.markup import block, heading, join, paragraph, table
from sparring.reporting.wording import UPPER_BOUND, count, number, threat_name

ORDER = 66
TITLE = "Defenses"

_LEAD = (
    "Every defense met the same images, attacks and seeds. The naive attack ignores it; the adaptive one knows it: "
    "it goes straight through what has no gradient, takes the mean over what is random, and counts a detector's flag."
)
_HEAD = (
    "defense", "adaptive", "95 % interval", "naive → adaptive", "finding", "clean", "proved",
    "training, inference (×\u00a0plain)", "signs",
)  # fmt: skip
_READING = (
    "Ordered by accuracy under the adaptive attack. The bracket below its bar, and the column beside it, is where "
    "that figure lies for all such images, with 95 % confidence; an order within it may be "
    "chance. On these images robust accuracy is between what is proved (0 where no proof was within reach) and the "
    "adaptive figure."
)
_RANKED = Markup('<span class="ranked" style="--share:{:.4f};--low:{:.4f};--high:{:.4f}">{}</span>')


def render(run: Run) -> str | None:
    """The table, ordered by the adaptive figure, and why each ended as it did."""
    figures, found = run.figures(SECTION) or {}, rows(run)
    if not found:
        return _cut_short(run)
    setting = (
        f"{number_of(figures.get('rows') or 0, 'test image')}, {threat_name(run.plan)}. Adaptive: {UPPER_BOUND}."
    )
    warnings = [paragraph(warning) for warning in figures.get("warnings") or []]
    return join(
        [
            paragraph(_LEAD, "lead"),
            paragraph(setting, "finding"),
            block("limits", *warnings) if warnings else "",
            block("ranking", table("The defenses", _HEAD, [_line(place, row) for place, row in enumerate(found, 1)])),
            paragraph(_READING, "note"),
            heading("Why each ended so"),
            block("told", table("Why each ended so", ("defense", "finding", "why"), [_why(row) for row in found])),
        ]
    )


def _cut_short(run: Run) -> str | None:
    """How far a run came that has no table yet."""
    plan = run.plan
    wanted = (plan.get("settings") or {}).get(SECTION)
    if plan.get("kind") != "defend" or not wanted:
        return None
    done = sum(part.startswith("labels--") for part in run.sections)
    return paragraph(
        f"The run was cut short: everything was tried on {count(done)} of {number_of(len(wanted), 'defense')}. There "
        f"is no table before all are measured; the same command with the same --out goes on.",
        "finding",
    )


def _line(place: int, row: Row) -> tuple[object, ...]:
    """One defense; the naive figure never without the adaptive one."""
    return (
        Markup("{}. {}").format(place, link(row)),
        _ranked(row),
        between(ends(row)),
        f"{share(row.get('naive'))} → {share(row.get('adaptive'))}",
        badge(row),
        share(row.get("clean")),
        share(row.get("certified")),
        f"{number(row.get('training_cost'), 1)}, {number(row.get('inference_cost'), 1)}",
        count(len(row.get("signs") or [])),
    )


def _ranked(row: Row) -> Markup:
    """The adaptive figure with a bar behind it, and its interval as a bracket over that."""
    value = row.get("adaptive") or 0.0
    return _RANKED.format(value, *(ends(row) or (value, value)), share(row.get("adaptive")))


def _why(row: Row) -> tuple[object, ...]:
    told = f"{sentence(row)} {claimed(row)}".rstrip()
    return link(row), badge(row), Markup('<span class="wrap">{}</span>').format(told)
