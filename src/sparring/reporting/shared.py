"""What the panels of a universal perturbation and of a patch have in common, and how each of these is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from sparring.auditing.run import Run
from sparring.reporting.markup import bar, details, table
from sparring.reporting.pictures import as_bytes, drawable, signed
from sparring.reporting.wording import MISSING, class_namer, count, percent

Figures = Mapping[str, Any]


def perturbation(delta: Tensor) -> tuple[Tensor, float]:
    """A (c, h, w) perturbation as a uint8 picture, and the factor that draws its largest value in full colour."""
    largest = float(delta.abs().max())
    factor = 1.0 / largest if largest else 1.0
    return signed(drawable(delta[None])[0] * factor), factor


def patch(pixels: Tensor, mask: Tensor, bounds: tuple[float, float]) -> Tensor:
    """A (c, size, size) patch as a uint8 picture, see-through where its mask (size, size) leaves something out."""
    picture = as_bytes(pixels[None], bounds)[0]
    if mask.all():
        return picture
    return torch.cat([picture.expand(3, -1, -1), mask[None].to(torch.uint8) * 255])


def asked(figures: Figures) -> str:
    """Which test images there was something to fool on, to follow "images that"."""
    return "it gets right untouched" + (" and are of another class" if figures.get("target") is not None else "")


def setting(figures: Figures) -> str:
    """What it was fitted and judged on, and what that cost, in two sentences."""
    fit = figures.get("fit") or {}
    each = "" if figures.get("draws", 1) == 1 else f", each at {figures['draws']} places"
    return (
        f"Fitted on {count(fit.get('rows'))} training images ({count(fit.get('forward'))} forward and "
        f"{count(fit.get('backward'))} backward passes), judged on {count(figures.get('held'))} test images that "
        f"the model gets right untouched{each}, of {count(figures.get('rows'))}. "
        f"Model {figures.get('model', MISSING)}."
    )


def rates_table(figures: Figures) -> Markup:
    """The success of what was fitted, beside the controls."""
    rates: Mapping[str, Any] = figures.get("rates") or {}
    lines = [
        (name if name == "fitted" else f"control: {name}", bar(rate, percent(rate))) for name, rate in rates.items()
    ]
    on_training = (figures.get("fit") or {}).get("success")
    return table(
        "Success", ("", "test images fooled"), [*lines, ("fitted, on its training images", percent(on_training))]
    )


def class_table(run: Run, figures: Figures) -> Markup:
    """For each true class how many fell, and how many to the control; and how often it is what is seen instead."""
    name = class_namer(run.plan)
    entries, named = figures.get("classes") or [], figures.get("named") or []
    control = figures.get("control", "control")
    lines = [
        (
            name(entry.get("label")),
            count(entry.get("rows")),
            bar(entry.get("success"), percent(entry.get("success"))),
            percent(entry.get("control")),
            count(named[place] if place < len(named) else None),
        )
        for place, entry in enumerate(entries)
    ]
    head = ("class", "test images of it", "fooled", f"by the control ({control})", "fooling images taken for it")
    drawn = table("Class by class", head, lines)
    return drawn if len(lines) <= 20 else details("Class by class", drawn)
