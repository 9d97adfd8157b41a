"""The warning signs: what makes a robustness figure unreliable, measured one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from sparring.auditing.run import Run
from sparring.reporting.markup import join, paragraph, table
from sparring.reporting.wording import MISSING, count

ORDER = 86
TITLE = "The checklist"

Sign = Mapping[str, Any]
_LEAD = (
    "An attack can fail without the model being robust. Each line is a sign of that: it is raised when its "
    "measure is above its threshold, and then the upper end of robust accuracy may be too high."
)


def render(run: Run) -> str | None:
    """Every sign, those raised first, with what to do about them."""
    figures = run.figures("checklist")
    if not figures or not figures.get("signs"):
        return None
    signs: list[Sign] = sorted(figures["signs"], key=_rank)
    lines = [
        (_name(sign), _mark(sign), _figure(sign, "measure"), _figure(sign, "threshold"), _words(sign))
        for sign in signs
    ]
    head = ("sign", "result", "measure", "threshold", "finding")
    body = table("The checklist", head, lines)
    return join(
        [
            paragraph(_LEAD, "lead"),
            paragraph(_finding(figures, signs), "finding"),
            Markup('<div class="signs">{}</div>').format(body),
        ]
    )


def _rank(sign: Sign) -> int:
    """Raised, then not measured, then the others."""
    return 0 if sign.get("raised") else 1 if sign.get("measure") is None else 2


def _finding(figures: Mapping[str, Any], signs: list[Sign]) -> str:
    """How many are raised, and how many could not be measured."""
    raised, unknown = (sum(_rank(sign) == rank for sign in signs) for rank in (0, 1))
    told = f"{raised or 'None'} of {len(signs)} signs {'is' if raised < 2 else 'are'} raised"
    told += f", {unknown} could not be measured." if unknown else ", and all were measured."
    told += f" The sample: {count(figures.get('rows'))} images that the model gets right."
    return told if raised else f"{told} That is no proof: it says only that these known failures were not seen."


def _mark(sign: Sign) -> Markup:
    """The outcome, in words and not in colour alone."""
    word = ("raised", "not measured", "not raised")[_rank(sign)]
    return Markup('<span class="sign {}">{}</span>').format(("up", "unknown", "down")[_rank(sign)], word)


def _name(sign: Sign) -> str:
    return str(sign.get("name", "unnamed")).replace("_", " ")


def _figure(sign: Sign, key: str) -> str:
    value = sign.get(key)
    return MISSING if value is None else f"{value:.3g}"


def _words(sign: Sign) -> Markup:
    """What was found, and what to do where the sign is raised."""
    advice = Markup("<strong>{}</strong>").format(sign.get("advice", "")) if sign.get("raised") else ""
    return Markup('<span class="wrap">{} {}</span>').format(sign.get("finding", ""), advice)
