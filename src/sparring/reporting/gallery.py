"""A clean image, what was added to it, and what came of it, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from sparring.auditing.run import Run
from sparring.reporting.markup import join, tile
from sparring.reporting.pictures import picture, signed
from sparring.reporting.wording import class_namer, confidence, plain

_SUM = Markup('<div class="triptych">{}{}<b aria-hidden="true">+</b>{}<b aria-hidden="true">=</b>{}</div>')


def magnification(change: Tensor) -> float:
    """The factor that draws the largest change of a gallery at half the range of a pixel."""
    largest = float(change.abs().max()) if change.numel() else 0.0
    return 0.5 / largest if largest else 1.0


def triptychs(run: Run, section: str, change: Tensor | None = None, added: str = "change") -> Markup:
    """One row for each image a section stored; `change` is what was added, in units of a pixel's full range."""
    tensors, shown = run.tensors(section), (run.figures(section) or {}).get("shown") or []
    if "x" not in tensors or "adversarial" not in tensors:
        return Markup()
    clean, adversarial = tensors["x"], tensors["adversarial"]
    if change is None:
        change = (adversarial.to(torch.float32) - clean.to(torch.float32)) / 255
    return sums(run.plan, clean, adversarial, change, shown, added)


def sums(
    plan: Mapping[str, Any],
    clean: Tensor,
    adversarial: Tensor,
    change: Tensor,
    shown: Sequence[Mapping[str, Any]],
    added: str = "change",
    heads: Sequence[str] = (),
    *,
    apart: bool = False,
) -> Markup:
    """Rows of clean + change = adversarial from (m, 1 or 3, h, w) uint8 images, each with its facts and its head.

    All changes are drawn with one factor, or, where they stand `apart`, each with its own.
    """
    factors = [magnification(change[place] if apart else change) for place in range(len(clean))]
    name = class_namer(plan)
    rows = []
    for place, image in enumerate(clean):
        fact: Mapping[str, Any] = shown[place] if place < len(shown) else {}
        factor = factors[place]
        label, before = name(fact.get("label")), name(fact.get("prediction"))
        after = name(fact.get("adversarial_prediction"))
        scale = f"drawn × {plain(round(factor, 2))}"
        caption = scale if fact.get("distance") is None else f"{scale}, distance {fact['distance']:.3g}"
        head = Markup('<p class="head">{}</p>').format(heads[place]) if place < len(heads) else ""
        rows.append(
            _SUM.format(
                head,
                tile(
                    picture(image, f"a clean image of {label}, read as {before}"),
                    Markup("read as <strong>{}</strong>").format(before),
                    confidence(fact.get("confidence")),
                ),
                tile(picture(signed(2 * factor * change[place]), f"the {added}, {scale}"), added, caption),
                tile(
                    picture(adversarial[place], f"the sum: an image of {label}, read as {after}"),
                    Markup("read as <strong>{}</strong>").format(after),
                    confidence(fact.get("adversarial_confidence")),
                    style="" if fact.get("adversarial_prediction") == fact.get("label") else "fooled",
                ),
            )
        )
    return Markup('<div class="triptychs">{}</div>').format(join(rows))
