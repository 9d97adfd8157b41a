"""What a share among some rows says about all rows."""

from __future__ import annotations


def clopper_pearson(hits: int, rows: int, level: float = 0.95) -> tuple[float, float]:
    """The exact interval for a share of which `hits` of `rows` were seen (Clopper and Pearson 1934)."""
    from scipy.special import betaincinv  # the quantiles of beta; scipy.stats takes a second to load

    tail = (1 - level) / 2
    low = float(betaincinv(hits, rows - hits + 1, tail)) if hits else 0.0
    high = float(betaincinv(hits + 1, rows - hits, 1 - tail)) if hits < rows else 1.0
    return low, high
