"""An attack on one model: what it reached, and some of the images."""

from __future__ import annotations

from sparring.auditing.run import Run
from sparring.reporting.attack_table import attack_chart, attack_table
from sparring.reporting.gallery import triptychs
from sparring.reporting.markup import heading, join, paragraph
from sparring.reporting.wording import count

ORDER = 60
TITLE = "The attack"


def render(run: Run) -> str | None:
    """The table of attacks, and a gallery chosen by a stated rule."""
    figures = run.figures("attack")
    if not figures:
        return None
    rows, attacks = figures.get("rows") or 0, figures.get("attacks") or []
    setting = (
        f"{count(rows)} images of {figures.get('data', 'a data set not recorded')}, "
        f"model {figures.get('model', 'not recorded')}, threat model {figures.get('threat', 'not recorded')}."
    )
    parts = [
        paragraph(setting, "finding"),
        attack_table(attacks, rows),
        attack_chart("attack", attacks, rows),
    ]
    if gallery := triptychs(run, "attack"):
        parts += [heading("Clean, change, adversarial")]
        parts += [
            paragraph(f"Which rows are shown: {figures.get('rule', 'the rule was not recorded')}.".replace("..", "."))
        ]
        parts += [gallery]
    return join(parts)
