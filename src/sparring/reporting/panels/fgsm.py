"""One step along the sign of the gradient."""

from __future__ import annotations

from sparring.auditing.run import Run
from sparring.reporting.gallery import triptychs
from sparring.reporting.markup import join, paragraph
from sparring.reporting.wording import count, net_name, percent, plain

ORDER = 20
TITLE = "One step (FGSM)"

_LEAD = (
    "The gradient of the loss tells, for every pixel, which way hurts the network most. "
    "FGSM moves every pixel by eps that way, once, and keeps it between 0 (black) and 1 (white)."
)


def render(run: Run) -> str | None:
    """The success of one step, and rows of image + eps × sign = result."""
    figures = run.figures("fgsm")
    if not figures:
        return None
    eps, sign = figures.get("eps"), run.tensors("fgsm").get("sign")
    told = (
        f"With eps = {plain(eps)}, one step makes the {net_name(figures.get('net', 'network'))} wrong on "
        f"{percent(figures.get('success'))} of {count(figures.get('rows'))} test images."
    )
    change = None if sign is None or eps is None else eps * sign.float()
    added = f"{plain(eps)} × sign of the gradient"
    return join([paragraph(_LEAD, "lead"), paragraph(told, "finding"), triptychs(run, "fgsm", change, added)])
