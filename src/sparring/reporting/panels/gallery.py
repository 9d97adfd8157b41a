"""Some of the broken images: before, what was added, after, and which stage decided."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sparring.auditing.run import Run
from sparring.reporting.audited import pixel_range
from sparring.reporting.gallery import sums
from sparring.reporting.markup import join, paragraph
from sparring.reporting.pictures import as_bytes, drawable
from sparring.reporting.wording import MISSING, class_namer, norm_name

ORDER = 84
TITLE = "Some broken images"


def render(run: Run) -> str | None:
    """Each image as clean + change = adversarial, and the rule that chose them."""
    figures, tensors = run.figures("gallery"), run.tensors("gallery")
    if not figures or not {"x", "adversarial"} <= tensors.keys() or not len(tensors["x"]):
        return None
    bounds = low, high = pixel_range(run.plan)
    clean, adversarial = tensors["x"].to(torch.float32), tensors["adversarial"].to(torch.float32)
    shown = figures.get("shown") or []
    name = class_namer(run.plan)
    rule = str(figures.get("rule") or "the rule was not recorded").rstrip(".")
    scale = "blue is darker, white unchanged, red brighter" if drawable(clean).shape[1] == 1 else "grey is unchanged"
    return join(
        [
            paragraph(f"Which images are shown: {rule}.", "lead"),
            paragraph(
                f"The change is drawn magnified by the factor below it ({scale}), and its size is given in "
                f"{norm_name(run.plan.get('norm', 'the norm of the threat model'))}. Pictures here have 8 bits a "
                "pixel; labels and confidences are those of the exact images, which the evidence holds."
            ),
            sums(
                run.plan,
                as_bytes(clean, bounds),
                as_bytes(adversarial, bounds),
                drawable(adversarial - clean) / (high - low),
                shown,
                heads=[_head(name, fact) for fact in shown],
            ),
        ]
    )


def _head(name: Any, fact: Mapping[str, Any]) -> str:
    """Which image it is, who broke it, and whether a file keeps it so."""
    told = [
        f"Image {fact.get('id', MISSING)}, true class {name(fact.get('label'))}",
        f"broken by {fact.get('decided_by') or 'a stage not recorded'}",
    ]
    files = {True: "also as an 8-bit file", False: "not as an 8-bit file"}.get(fact.get("eight_bit", MISSING))
    return ", ".join(told + ([files] if files else []))
