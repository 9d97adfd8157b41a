"""One image, and what each attack makes of it."""

from __future__ import annotations

import torch

from sparring.auditing.run import Run
from sparring.reporting.audited import pixel_range
from sparring.reporting.gallery import sums
from sparring.reporting.markup import join, paragraph
from sparring.reporting.pictures import as_bytes, drawable
from sparring.reporting.wording import class_namer, number

ORDER = 64
TITLE = "One image under each attack"


def render(run: Run) -> str | None:
    """Clean + change = adversarial, one attack a row, each change drawn with its own factor."""
    each, tensors = (run.figures("attack") or {}).get("each"), run.tensors("attack")
    if not each or not {"each_x", "each_adversarial"} <= tensors.keys():
        return None
    bounds = low, high = pixel_range(run.plan)
    attacked = tensors["each_adversarial"].to(torch.float32)
    clean = tensors["each_x"].to(torch.float32).expand_as(attacked)
    shown, change = each["attacks"], drawable(attacked - clean) / (high - low)
    moved = (attacked - clean).flatten(1).double()
    heads = [
        f"{fact['attack']}: Linf {number(linf, 3)}, L2 {number(l2, 2)}, {int(pixels)} values changed"
        for fact, linf, l2, pixels in zip(
            shown, moved.abs().amax(1).tolist(), moved.norm(dim=1).tolist(), (moved != 0).sum(1).tolist(), strict=True
        )
    ]
    scale = "blue is darker, white unchanged, red brighter" if change.shape[1] == 1 else "grey is unchanged"
    return join(
        [
            paragraph(
                f"Image {each['id']}, a {class_namer(run.plan)(shown[0]['label'])}: the first of those that fell to "
                "the most attacks here.",
                "lead",
            ),
            paragraph(f"Each change is drawn magnified by the factor below it ({scale})."),
            sums(
                run.plan, as_bytes(clean, bounds), as_bytes(attacked, bounds), change, shown, heads=heads, apart=True
            ),
        ]
    )
