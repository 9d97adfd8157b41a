"""Charts: what stands at their axes."""

from __future__ import annotations

import re

import pytest
from matplotlib.axes import Axes

from sparring.reporting import charts


@pytest.mark.parametrize(
    ("ends", "ticks"),
    [((2000.0, 32000.0), ["2,000", "5,000", "10,000", "20,000"]), ((0.02, 0.3), ["0.02", "0.05", "0.1", "0.2"])],
)
def test_a_logarithmic_axis_has_plain_figures(ends, ticks):
    def draw(axes: Axes) -> None:
        axes.plot(ends, [0.0, 1.0])
        charts.log_axis(axes, "x", "spent")
        axes.set_yticks([])

    assert re.findall(r">([\d.,e+-]+)</text>", charts.svg("test", draw)) == ticks
