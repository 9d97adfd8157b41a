"""Images that are noise to a person and a class to the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from torch import Tensor

from sparring.auditing.run import Run
from sparring.reporting.markup import block, details, heading, join, paragraph, table, tile
from sparring.reporting.pictures import picture
from sparring.reporting.wording import MISSING, class_namer, confidence, count, net_name, plain

ORDER = 30
TITLE = "Fooling noise"

Entries = Sequence[Mapping[str, Any]]
_LEAD = (
    "Here descent starts from noise and changes the image, not the weights, until the network names the "
    "goal. A person still sees noise. Confidences are rounded down."
)


def render(run: Run) -> str | None:
    """For each network a row of noise images, each with its goal and confidence."""
    figures = run.figures("fooling")
    if not figures:
        return None
    nets: Mapping[str, Entries] = figures.get("nets") or {}
    tensors = run.tensors("fooling")
    name = class_namer(run.plan)
    rows = [
        (
            net_name(net),
            name(entry.get("goal")),
            confidence(entry.get("confidence")),
            count(entry.get("steps")),
            _reached(entry),
        )
        for net, entries in nets.items()
        for entry in entries
    ]
    parts = [paragraph(_LEAD, "lead"), paragraph(_finding(figures, nets), "finding")]
    parts += [_row(run, net, entries, tensors.get(net)) for net, entries in nets.items()]
    head = ("network", "goal", "confidence", "steps", "reached")
    return join([*parts, details("The figures", table("The noise images", head, rows))])


def _reached(entry: Mapping[str, Any]) -> str:
    """Whether the goal was reached, in a word."""
    return {True: "yes", False: "no"}.get(entry.get("reached", MISSING), MISSING)


def _finding(figures: Mapping[str, Any], nets: Mapping[str, Entries]) -> str:
    """What was reached, in one or two sentences."""
    entries = [entry for net in nets.values() for entry in net]
    reached = sum(bool(entry.get("reached")) for entry in entries)
    sure = [entry["confidence"] for entry in entries if entry.get("confidence") is not None]
    least = min(sure, default=figures.get("min_confidence"))
    told = figures.get("classic_reached") or {}
    stalls = ""
    if told:
        each = " and ".join(f"{hits} on the {net_name(net)}" for net, hits in told.items())
        stalls = (
            f" The classic cost alone reaches {each} with the same steps: where the goal is out of sight, softmax "
            "leaves it no slope. Here a temperature keeps the goal in sight, and is 1 as soon as it leads."
        )
    return (
        f"{reached} of {len(entries)} noise images reach their goal within {count(figures.get('steps'))} "
        f"steps (lambda = {plain(figures.get('lambda'))}). The least confident answer is {confidence(least)}.{stalls}"
    )


def _row(run: Run, net: str, entries: Entries, images: Tensor | None) -> Markup:
    """One network's noise images."""
    name = class_namer(run.plan)
    tiles = []
    for place, entry in enumerate(entries):
        goal, sure = name(entry.get("goal")), confidence(entry.get("confidence"))
        alt = f"noise that the {net_name(net)} reads as {goal} with {sure}"
        image = picture(images[place], alt) if images is not None and place < len(images) else ""
        missed = entry.get("reached") is False
        tiles.append(
            tile(
                image,
                Markup("<strong>{}</strong>").format(goal),
                sure,
                *["not reached"] * missed,
                style="missed" * missed,
            )
        )
    return join([heading(f"The {net_name(net)} reads"), block("noise", *tiles)])
