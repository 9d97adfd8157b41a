"""What the panels of a comparison of defenses share: its rows, their names, links and words."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from sparring.auditing.run import Run
from sparring.core import showing
from sparring.defending.defend import SECTION
from sparring.defending.finding import BREAKS, HIDES, HOLDS
from sparring.reporting.wording import MISSING

Row = Mapping[str, Any]

LETTERS = 26  # of a name in a drawing
_BADGE = Markup('<span class="word {}">{}</span>')
_LINK = Markup('<a href="#{}" title="{}" class="{}">{}</a>')
_STYLES = {HOLDS: "good", HIDES: "bad", BREAKS: "bad"}


def rows(run: Run) -> list[Row]:
    """The defenses in the order of the table; none where the run has not come so far."""
    return [row for row in (run.figures(SECTION) or {}).get("defenses") or [] if row.get("defense") is not None]


def about(row: Row) -> Mapping[str, Any]:
    """What stands behind a line of the table."""
    return row.get("details") or {}


def name(row: Row) -> str:
    """What the defense is called."""
    return str(row["defense"])


def called(row: Row) -> str:
    """The name without the folders of a file."""
    return name(row).rpartition("/")[2] or name(row)


def short(row: Row) -> str:
    """The name as a drawing has room for."""
    text = called(row)
    return text if len(text) <= LETTERS else f"{text[: LETTERS - 1]}…"


def share(value: float | None) -> str:
    """A share in percent, rounded down, as the sentences of the findings have it."""
    return MISSING if value is None else showing.percent(value, 1)


def ends(row: Row, key: str = "adaptive") -> tuple[float, float] | None:
    """The interval of a figure for all such images."""
    found = (about(row).get("intervals") or {}).get(key)
    return (float(found[0]), float(found[-1])) if found else None


def between(interval: Sequence[float] | None) -> str:
    """An interval of shares in percent."""
    return MISSING if interval is None else f"{share(interval[0])} to {share(interval[1])}"


def shown(found: Sequence[Row]) -> list[Row]:
    """The rows that have what a chart of accuracies needs."""
    return [row for row in found if None not in (row.get("clean"), row.get("naive"), row.get("adaptive"))]


def anchor(row: Row) -> str:
    """The id of the part of the page that is about this defense alone."""
    return f"defense-{re.sub(r'[^A-Za-z0-9.=_+-]+', '-', str(about(row).get('slug') or name(row)))}"


def link(row: Row) -> Markup:
    """The name, leading to that part."""
    style = "long" if len(called(row)) > LETTERS else "short"
    return _LINK.format(anchor(row), name(row), style, called(row))


def badge(row: Row) -> Markup:
    """The finding as a word that stands out."""
    word = str(row.get("finding") or "not judged")
    return _BADGE.format(_STYLES.get(word, "plain"), word)


def sentence(row: Row) -> str:
    """Why it ended so, from a capital letter to a full stop."""
    return _ended(about(row).get("sentence") or "no reason was recorded")


def claimed(row: Row) -> str:
    """What randomised smoothing claims of it, which is no proof; nothing of what is no such noise."""
    told = (about(row).get("smoothed") or {}).get("sentence")
    return _ended(told) if told else ""


def _ended(text: object) -> str:
    """From a capital letter to a full stop."""
    told = str(text).rstrip(".")
    return f"{told[:1].upper()}{told[1:]}."


def sign(text: str) -> tuple[str, str]:
    """A warning sign's name in words, and what was seen."""
    known, _, told = text.partition(": ")
    seen = (told or known).replace(".; ", ". ")
    return known.replace("_", " "), _ended(seen)


_OUTCOMES = {"broken": "broken", "undecided": "not broken", "certified": "proved", "misclassified": "not right"}


def fate(row: Row, fact: Mapping[str, Any], named: Callable[[object], str]) -> tuple[str, str]:
    """The outcome of an image that is shown, and what the defense says of it there."""
    if "adversarial_prediction" not in fact:
        said = MISSING
    elif (answer := fact["adversarial_prediction"]) is None:
        said = "flagged"
    else:
        said = f"read as {named(answer)}"
    outcome = str(fact.get("outcome"))
    return _OUTCOMES.get(outcome, outcome), said
