"""The same images attacked under every defense: what was added, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from sparring.auditing.run import Run
from sparring.defending.defend import SECTION
from sparring.reporting.audited import pixel_range
from sparring.reporting.defended import Row, about, fate, link, name, rows
from sparring.reporting.gallery import magnification
from sparring.reporting.markup import block, join, paragraph, tile
from sparring.reporting.pictures import as_bytes, drawable, picture, signed
from sparring.reporting.wording import class_namer, plain

ORDER = 71
TITLE = "The same images under every defense"

_LEAD = (
    "The first images that the undefended net gets right. Above: the image as attacked; below: what was added to it; "
    "then the outcome, and what the defense says of the image when asked once more. A dashed frame: it fell."
)
_HELD = (
    "Of an image that nothing broke, the attempt shown is where PGD on the bare net ended; of one that is not right "
    "untouched, the image itself."
)
_TABLE = Markup(
    '<div class="fates scroll" role="region" aria-label="{}" tabindex="0"><table><thead><tr>{}</tr></thead>'
    "<tbody>{}</tbody></table></div>"
)
_LINE = Markup('<tr><th scope="row">{}</th>{}</tr>')


def render(run: Run) -> str | None:
    """A column an image, a line a defense."""
    tensors = run.tensors(SECTION)
    found = [row for row in rows(run) if _stored(row) in tensors and about(row).get("images")]
    if "x" not in tensors or not len(tensors["x"]) or not found:
        return None
    bounds = low, high = pixel_range(run.plan)
    clean = tensors["x"].to(torch.float32)
    change = {name(row): drawable(tensors[_stored(row)].to(torch.float32) - clean) / (high - low) for row in found}
    factor = magnification(torch.cat(list(change.values())))
    scale = "blue is darker, white unchanged, red brighter" if drawable(clean).shape[1] == 1 else "grey is unchanged"
    lines = [
        _LINE.format(
            link(row), _cells(run, row, as_bytes(tensors[_stored(row)], bounds), 2 * factor * change[name(row)])
        )
        for row in found
    ]
    return join(
        [
            paragraph(_LEAD, "lead"),
            paragraph(f"{_HELD} All changes are drawn ×\u00a0{plain(round(factor, 2))} ({scale})."),
            _TABLE.format(TITLE, _head(run.plan, about(found[0])["images"], as_bytes(clean, bounds)), join(lines)),
        ]
    )


def _stored(row: Row) -> str:
    return f"changed--{about(row).get('slug')}"


def _head(plan: Mapping[str, Any], facts: Sequence[Mapping[str, Any]], clean: Tensor) -> Markup:
    """The clean images with their classes."""
    named = class_namer(plan)
    cell = Markup('<th scope="col">{}</th>')
    cells = [
        cell.format(
            tile(
                picture(image, f"image {fact.get('id')}, clean"), named(fact.get("label")), f"image {fact.get('id')}"
            )
        )
        for image, fact in zip(clean, facts, strict=False)
    ]
    return join([Markup("<td>untouched</td>"), *cells])


def _cells(run: Run, row: Row, attacked: Tensor, change: Tensor) -> Markup:
    """Each image as attacked, what was added, and the outcome."""
    named, cells = class_namer(run.plan), []
    for fact, image, added in zip(about(row)["images"], attacked, change, strict=False):
        word, said = fate(row, fact, named)
        alt = f"image {fact.get('id')} under {name(row)}: {word}, {said}"
        pair = block("over", picture(image, alt), picture(signed(added), f"what was added to it, {_far(fact)}"))
        style = "fooled" if fact.get("outcome") == "broken" else ""
        cells.append(
            Markup("<td>{}</td>").format(tile(pair, Markup("<strong>{}</strong>").format(word), said, style=style))
        )
    return join(cells)


def _far(fact: Mapping[str, Any]) -> str:
    far = fact.get("distance")
    return "distance not recorded" if far is None else f"distance {far:.3g}"
