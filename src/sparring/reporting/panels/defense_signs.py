"""The warning signs of each defense: what makes its figure unreliable, or shows how it works."""

from __future__ import annotations

from collections import Counter

from markupsafe import Markup

from sparring.auditing.run import Run
from sparring.core.showing import number_of
from sparring.reporting.defended import link, rows, sign
from sparring.reporting.markup import block, join, paragraph, table
from sparring.reporting.wording import count

ORDER = 72
TITLE = "Warning signs"

_LEAD = (
    "Signs that a gradient misleads, that a claim does not hold, that the adaptive attack left what something "
    "simpler breaks, or that it was not at its end. One that is raised means that the figure may be too high; that "
    "none is raised is no proof."
)
_SIGN = Markup('<span class="sign up">{}</span>')


def render(run: Run) -> str | None:
    """Every sign that is raised, a line each, and who has none."""
    found = rows(run)
    if not found:
        return None
    raised = [(row, *sign(str(text))) for row in found for text in row.get("signs") or []]
    clear = [link(row) for row in found if not row.get("signs")]
    kinds = Counter(what for _, what, _ in raised)
    told = f"{number_of(len(raised), 'sign') if raised else 'No signs'} raised"
    told += f" on {count(len(found) - len(clear))} of {number_of(len(found), 'defense')}" if raised else ""
    often = kinds.most_common(1)
    told += f"; most often: {often[0][0]} ({count(often[0][1])})." if often else "."
    wrap = Markup('<span class="wrap">{}</span>')
    lines = [(link(row), _SIGN.format(what), wrap.format(seen)) for row, what, seen in raised]
    parts = [paragraph(_LEAD, "lead"), paragraph(told, "finding")]
    if lines:
        parts.append(block("told", table("Warning signs", ("defense", "sign", "what was seen"), lines)))
    if clear:
        parts.append(paragraph(Markup("None raised: {}.").format(Markup(", ").join(clear)), "note"))
    return join(parts)
