"""Attacks side by side on the same rows: who comes nearest, and what that costs."""

from __future__ import annotations

from sparring.auditing.run import Run
from sparring.core.threat import NORMS
from sparring.reporting.contest import BEST, drawings
from sparring.reporting.markup import bar, block, chart, heading, join, paragraph, table
from sparring.reporting.wording import norm_name, number, percent

ORDER = 62
TITLE = "Nearest, and at what cost"

_LEAD = (
    "The same images, the same judge. Optimality is how near an attack comes to the best that any of them found, "
    "row by row: 100 % where it found that for every row, 0 % where it found nothing (the area between its curve and "
    "that of the best of all; AttackBench, 2024)."
)
_WHY = (
    "The wide line takes the nearest image that any attack found for each row. A line above it leaves rows that "
    "another attack breaks nearer by. No line proves robustness: each is an upper bound."
)
_FRONT = (
    "Down and to the left is better: nearer images for fewer passes. On the front are the attacks that no other "
    "beats: none reaches at least their success at a median no farther for no more passes."
)


def render(run: Run) -> str | None:
    """Security curves, distance against cost, and the distances in every norm."""
    drawn = drawings(run)
    figures = run.figures("attack")
    if not drawn or not figures:
        return None
    parts = [paragraph(_LEAD, "lead")]
    why = block("why", heading("How to read it"), paragraph(_WHY), _ranking(figures["attacks"]))
    parts.append(block("pair aside", chart(drawn["security"]), why))
    if "front" in drawn:
        told = block("why", heading("The front"), paragraph(_FRONT))
        parts.append(block("pair aside", chart(drawn["front"]), told))
    return join([*parts, heading("Distance in every norm"), _distances(figures["attacks"])])


def _ranking(attacks: list[dict[str, object]]) -> object:
    """Attacks by optimality."""
    known = [attack for attack in attacks if isinstance(attack.get("optimality"), float)]
    ordered = sorted(known, key=lambda attack: -float(str(attack["optimality"])))
    rows = [(a["name"], bar(float(str(a["optimality"])), percent(float(str(a["optimality"]))))) for a in ordered]
    return table(f"Optimality against the {BEST}", ("attack", "optimality"), rows)


def _distances(attacks: list[dict[str, object]]) -> object:
    """Medians over all rows that held untouched, means over those that fell."""
    head = [f"{kind} {norm_name(norm)}" for norm in NORMS for kind in ("median", "mean")]
    rows = [
        (
            attack["name"],
            *(number(attack.get(f"{kind}_{norm}"), 1 if norm == "l0" else 3)  # type: ignore[arg-type]  # JSON
              for norm in NORMS for kind in ("median", "mean")),
        )
        for attack in attacks
    ]  # fmt: skip
    return table("Distances", ("attack", *head), rows)
