"""One perturbation for all images: what it looks like, what it does, and what random noise of its size does."""

from __future__ import annotations

from markupsafe import Markup

from sparring.auditing.run import Run
from sparring.reporting.gallery import triptychs
from sparring.reporting.markup import block, heading, join, paragraph, tile
from sparring.reporting.pictures import drawable, picture
from sparring.reporting.shared import asked, class_table, perturbation, rates_table, setting
from sparring.reporting.wording import class_namer, count, percent, plain

ORDER = 61
TITLE = "One perturbation for all images"

_LEAD = (
    "One and the same perturbation is added to every image. It was fitted on training images and is judged on test "
    "images that it never saw, once each; noise of the same size in a random direction stands beside it."
)


def render(run: Run) -> str | None:
    """The perturbation, its success, class by class, and some of the images."""
    figures, tensors = run.figures("universal"), run.tensors("universal")
    if not figures or "delta" not in tensors:
        return None
    delta = tensors["delta"]
    drawn, factor = perturbation(delta)
    target, name = figures.get("target"), class_namer(run.plan)
    rates = figures.get("rates") or {}
    does = "name a wrong class" if target is None else f"name {name(target)}"
    told = (
        f"Within {figures.get('threat', 'a threat model not recorded')} one perturbation makes the model {does} on "
        f"{percent(rates.get('fitted'))} of the {count(figures.get('held'))} test images that {asked(figures)}; "
        f"random noise of its size does so on {percent(rates.get(str(figures.get('control'))))}."
    )
    scale = (
        "blue is darker, white unchanged, red brighter"
        if drawable(delta[None]).shape[1] == 1
        else "grey is unchanged"
    )
    caption = f"drawn × {plain(round(factor, 2))}; {scale}"
    parts = [
        paragraph(_LEAD, "lead"),
        paragraph(told, "finding"),
        block(
            "pair aside",
            block("poster", tile(picture(drawn, f"the perturbation, {caption}"), "the perturbation", caption)),
            block("beside", rates_table(figures), paragraph(setting(figures), "note")),
        ),
        heading("Class by class"),
        class_table(run, figures),
    ]
    change = drawable(delta[None]).expand(len(tensors.get("x", ())), -1, -1, -1)
    if gallery := triptychs(run, "universal", change, "the perturbation"):
        parts += [heading("Clean, perturbation, adversarial"), paragraph(f"Shown: {figures.get('rule')}."), gallery]
    return Markup(join(parts))
