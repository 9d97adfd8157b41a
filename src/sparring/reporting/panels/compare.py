"""Several attacks on the same images, under one threat model."""

from __future__ import annotations

from sparring.auditing.run import Run
from sparring.reporting.attack_table import attack_chart, attack_table
from sparring.reporting.markup import join, paragraph
from sparring.reporting.wording import count, net_name, percent

ORDER = 50
TITLE = "Attacks compared"

_LEAD = (
    "Every attack gets the same images and the same network, in the threat model that it works in. Those without "
    "a budget look for the nearest image that fools. "
    "Success is the share of images made wrong; a pass is one image through the network, forward or backward."
)


def render(run: Run) -> str | None:
    """The table of attacks, and success against passes."""
    figures = run.figures("compare")
    if not figures:
        return None
    rows, attacks = figures.get("rows") or 0, figures.get("attacks") or []
    setting = (
        f"{count(rows)} test images, {net_name(figures.get('net', 'network'))}, "
        f"threat model {figures.get('threat', 'not recorded')}."
    )
    budget = figures.get("threat")
    ranked = [a for a in attacks if a.get("success") is not None and a.get("threat", budget) == budget]
    if ranked:
        best = max(ranked, key=lambda attack: attack["success"])
        setting += f" The strongest within it is {best.get('name')}, with {percent(best['success'])}."
    return join(
        [
            paragraph(_LEAD, "lead"),
            paragraph(setting, "finding"),
            attack_table(attacks, rows),
            attack_chart("compare", attacks, rows),
        ]
    )
