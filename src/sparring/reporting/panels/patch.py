"""An adversarial patch: what it looks like, what it does, and what a patch that nobody fitted does."""

from __future__ import annotations

from markupsafe import Markup

from sparring.auditing.run import Run
from sparring.reporting.markup import block, heading, join, paragraph, tile
from sparring.reporting.pictures import picture
from sparring.reporting.shared import asked, class_table, patch, rates_table, setting
from sparring.reporting.wording import brief_confidence, class_namer, percent

ORDER = 62
TITLE = "An adversarial patch"

_LEAD = (
    "One patch is put on every image, anywhere and slightly turned and scaled; the rest of the image stays as it is. "
    "It was fitted on training images and is judged on test images that it never saw. Whatever covers a part of an "
    "image fools some models: so plain patches and one of noise stand beside it, at the same places."
)


def render(run: Run) -> str | None:
    """The patch, its success, class by class, and some of the images."""
    figures, tensors = run.figures("patch"), run.tensors("patch")
    if not figures or not {"patch", "mask"} <= tensors.keys():
        return None
    target, name = figures.get("target"), class_namer(run.plan)
    rates, size = figures.get("rates") or {}, figures.get("size")
    does = "names a wrong class" if target is None else f"names {name(target)}"
    told = (
        f"With a {figures.get('shape')} patch of {size} × {size} pixels the model {does} on "
        f"{percent(rates.get('fitted'))} of the test images that {asked(figures)}; with the best of the "
        f"controls ({figures.get('control')}) on {percent(rates.get(str(figures.get('control'))))}."
    )
    fitted, control = rates.get("fitted"), rates.get(str(figures.get("control")))
    if fitted is not None and control is not None and fitted <= control:
        told += " So it does no more than to cover a part of the image does."
    drawn = patch(tensors["patch"], tensors["mask"], (0.0, 1.0))
    parts = [
        paragraph(_LEAD, "lead"),
        paragraph(told, "finding"),
        block(
            "pair aside",
            block("poster", tile(picture(drawn, "the patch"), "the patch", f"{size} × {size} pixels")),
            block("beside", rates_table(figures), paragraph(setting(figures), "note")),
        ),
        heading("Class by class"),
        class_table(run, figures),
    ]
    if gallery := _gallery(run):
        parts += [heading("What the model reads"), paragraph(f"Shown: {figures.get('rule')}."), gallery]
    return Markup(join(parts))


def _gallery(run: Run) -> Markup:
    """Test images with the patch on them, and what they are taken for."""
    name, images = class_namer(run.plan), run.tensors("patch").get("adversarial")
    tiles = []
    for place, fact in enumerate((run.figures("patch") or {}).get("shown") or []):
        if images is None or place >= len(images):
            break
        label, said = name(fact.get("label")), name(fact.get("adversarial_prediction"))
        sure = brief_confidence(fact.get("adversarial_confidence"))
        drawn = picture(images[place], f"an image of {label} with the patch on it, read as {said}")
        tiles.append(tile(drawn, Markup("<strong>{}</strong>").format(said), f"is {label}; {sure}"))
    return block("noise", *tiles) if tiles else Markup()
