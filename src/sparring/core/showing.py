"""Figures in words and in JSON, and how an object shows itself in a notebook."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from torch import Tensor

_CELL = "padding:.25em .8em;text-align:{}"


def percent(share: float | None, digits: int = 2) -> str:
    """A share as a percentage, rounded down: 99.999 % is no 100 %; a dash for none."""
    if share is None or math.isnan(share):
        return "-"
    scale = 10**digits
    return f"{math.floor(share * 100 * scale + 1e-6) / scale:.{digits}f} %"


def figure(value: float | None, digits: int = 3) -> str:
    """A number, or a dash for none."""
    return "-" if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def number_of(count: int, what: str) -> str:
    """A count of things, such as `1 row`, `0 rows`, `1,024 draws`."""
    return f"{count:,} {what if count == 1 else f'{what}s'}"


def rounded(value: float | None, digits: int = 6) -> float | None:
    """A figure for JSON: NaN, which JSON lacks, becomes None."""
    return None if value is None or value != value else round(value, digits)


def mean(values: Tensor) -> float | None:
    """The mean, or None of nothing."""
    return rounded(values.double().mean().item()) if len(values) else None


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[object]], note: str = "") -> str:
    """HTML that needs no style sheet; whatever is put in is escaped, and the first column names the row."""
    lines = [_line("th", head), *(_line("td", row) for row in rows)]
    below = f"<p>{escape(note)}</p>" if note else ""
    return f"<p><b>{escape(caption)}</b></p><table>{''.join(lines)}</table>{below}"


def _line(tag: str, cells: Sequence[object]) -> str:
    sides = ("left", *["right"] * (len(cells) - 1))
    inner = (
        f'<{tag} style="{_CELL.format(side)}">{escape(str(cell))}</{tag}>'
        for side, cell in zip(sides, cells, strict=True)
    )
    return f"<tr>{''.join(inner)}</tr>"
