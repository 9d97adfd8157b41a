"""What a share among some rows says about all rows."""

from __future__ import annotations


def clopper_pearson(hits: int, rows: int, level: float = 0.95) -> tuple[float, float]:
    """The exact interval for a share of which `hits` of `rows` were seen (Clopper and Pearson 1934)."""
    from scipy.stats import beta

    tail = (1 - level) / 2
    low = float(beta.ppf(tail, hits, rows - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1 - tail, hits + 1, rows - hits)) if hits < rows else 1.0
    return low, high
