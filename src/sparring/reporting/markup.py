"""The few pieces of HTML every panel is made of; whatever is put into one is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True)
class Chart:
    """A drawing, with what it says in words and in figures."""

    title: str
    alt: str
    svg: Markup
    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    legend: Markup | str = ""
    note: str = ""


def join(parts: Iterable[object]) -> Markup:
    """Pieces one after the other."""
    return Markup("\n").join(parts)  # type: ignore[arg-type]  # Markup escapes any object


def paragraph(text: object, style: str = "") -> Markup:
    """One paragraph."""
    return Markup('<p class="{}">{}</p>').format(style, text) if style else Markup("<p>{}</p>").format(text)


def block(style: str, *parts: object) -> Markup:
    """A `<div>` of a style."""
    return Markup('<div class="{}">{}</div>').format(style, join(parts))


def heading(text: object) -> Markup:
    """A heading within a panel."""
    return Markup("<h3>{}</h3>").format(text)


def details(summary: str, body: object) -> Markup:
    """Something to unfold."""
    return Markup("<details><summary>{}</summary>{}</details>").format(summary, body)


def tile(image: object, *captions: object, style: str = "") -> Markup:
    """A picture with its captions below."""
    lines = Markup("").join(Markup("<span>{}</span>").format(caption) for caption in captions)
    markup = Markup('<figure class="{}">{}<figcaption>{}</figcaption></figure>')
    return markup.format(f"tile {style}".strip(), image, lines)


def bar(share: float | None, text: str) -> Markup:
    """A figure with a bar behind it, as long as its share of one."""
    length = 0.0 if share is None else max(0.0, min(1.0, share))
    return Markup('<span class="bar" style="--share:{:.4f}">{}</span>').format(length, text)


def table(label: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> Markup:
    """A table that scrolls inside its own box; the first column names the row."""
    top = Markup("").join(Markup('<th scope="col">{}</th>').format(cell) for cell in head)
    lines = []
    for first, *rest in rows:
        cells = Markup("").join(Markup("<td>{}</td>").format(cell) for cell in rest)
        lines.append(Markup('<tr><th scope="row">{}</th>{}</tr>').format(first, cells))
    return Markup(
        '<div class="scroll" role="region" aria-label="{}" tabindex="0"><table>'
        "<thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>"
    ).format(label, top, join(lines))


def chart(drawn: Chart) -> Markup:
    """A chart, its legend, and its figures to unfold."""
    return Markup('<div class="chart"><h3>{}</h3>{}<figure role="img" aria-label="{}">{}</figure>{}{}</div>').format(
        drawn.title,
        drawn.legend,
        drawn.alt,
        drawn.svg,
        paragraph(drawn.note, "note") if drawn.note else "",
        details("The figures", table(drawn.title, drawn.head, drawn.rows)),
    )
