"""Certified accuracy over the radius under randomised smoothing: a statistical claim, apart from all proofs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from markupsafe import Markup
from matplotlib.axes import Axes
from torch import Tensor

from sparring.auditing.run import Run
from sparring.reporting import charts
from sparring.reporting.markup import Chart, bar, block, chart, heading, join, paragraph, table
from sparring.reporting.wording import count, number, percent, plain

ORDER = 88
TITLE = "Smoothed by noise"

Figures = Mapping[str, Any]
_LEAD = (
    "The smoothed classifier names the class that the net names most often under Gaussian noise on the image. Around "
    "an image whose class wins clearly, no image nearer in L2 than a radius has another class "
    "(Cohen, Rosenfeld and Kolter 2019)."
)


def render(run: Run) -> str | None:
    """The curve, the table, and what kind of claim it is."""
    figures, tensors = run.figures("smoothing"), run.tensors("smoothing")
    if not figures:
        return None
    setting = (
        f"{count(figures.get('rows'))} images of {figures.get('data', 'a data set not recorded')}, model "
        f"{figures.get('model', 'not recorded')}, noise of sigma {plain(figures.get('sigma'))}: average certified "
        f"radius {number(figures.get('average_radius'), 3)}."
    )
    drawn = [_curve(figures, tensors)] if {"radius", "right"} <= tensors.keys() else []
    why = block("why", heading("What it says, and what not"), *(paragraph(line) for line in _reading(figures)))
    return join(
        [
            paragraph(_LEAD, "lead"),
            paragraph(setting, "finding"),
            block("pair aside", *drawn, why),
            heading("Certified accuracy"),
            _table(figures),
        ]
    )


def _reading(figures: Figures) -> list[str]:
    """For what it holds, how surely, and what was left without a claim."""
    alpha, rows, draws = figures.get("alpha"), figures.get("rows"), count(figures.get("n"))
    sure = "" if alpha is None else f" = {1 - alpha:.10g}"
    told = [
        f"This is no proof. Each image's claim comes of n = {draws} draws and holds with probability 1 - alpha{sure} "
        f"per image, for the smoothed classifier, not for the net alone: whoever asks the net once, without noise, "
        f"has no such promise."
    ]
    if alpha is not None and rows:
        told.append(f"So on {count(rows)} images at most {alpha * rows:.2g} false claims are to be expected.")
    return [
        *told,
        f"Nothing is claimed of {count(figures.get('abstained'))} images whose vote was too close, nor of "
        f"{count(figures.get('wrong'))} for which the first {count(figures.get('n0'))} draws named a wrong class; "
        f"these were asked no further. Both count as not certified.",
        f"So many draws can claim a radius of {number(figures.get('largest_radius'), 3)} at most, even when all of "
        f"them agree; more draws or more noise reach further. It took {count(figures.get('forward'))} forward "
        f"passes.",
    ]


def _table(figures: Figures) -> Markup:
    """Certified accuracy at round radii."""
    lines = [(plain(radius), bar(share, percent(share))) for radius, share in figures.get("certified") or []]
    return table("Certified accuracy", ("L2 radius", "certified accuracy of the smoothed classifier"), lines)


def steps(radius: Tensor, right: Tensor) -> tuple[list[float], list[float]]:
    """Where certified accuracy falls, and to what: the share at the first radius holds before it too."""
    known, rows = radius[right.bool()].sort().values, max(1, len(radius))
    at = [0.0, *sorted(set(known.tolist()))]
    left = len(known) - torch.searchsorted(known, torch.tensor(at, dtype=known.dtype), right=True)
    return at, (left.double() / rows).tolist()


def _curve(figures: Figures, tensors: Mapping[str, Tensor]) -> Markup:
    """The steps, and how far so many draws can reach."""
    at, shares = steps(tensors["radius"], tensors["right"])
    largest = figures.get("largest_radius")
    told = ", ".join(f"{percent(share)} at {plain(radius)}" for radius, share in figures.get("certified") or [])
    marks = [] if largest is None else [charts.mark("M17.5 1v3M17.5 6v3M17.5 11v3", "as far as so many draws reach")]
    places = sorted({round(place * (len(at) - 1) / 10) for place in range(11)})
    return chart(
        Chart(
            title="Certified accuracy over the L2 radius",
            alt=f"Certified accuracy of the smoothed classifier over the L2 radius: {told}.",
            svg=charts.svg("smoothing", lambda axes: _draw(axes, at, shares, largest)),
            head=("L2 radius", "certified accuracy beyond it"),
            rows=[(plain(float(f"{at[place]:.4g}")), percent(shares[place])) for place in places],
            legend=charts.legend(["certified accuracy"], *marks),
            note="Only some steps are listed; rows.csv has the radius of every image.",
        )
    )


def _draw(axes: Axes, at: Sequence[float], shares: Sequence[float], largest: float | None) -> None:
    """A falling line of steps; a dashed line where no claim is possible any more."""
    end = 1.08 * max(at[-1], largest or 0.0) or 1.0
    axes.step([*at, end], [*shares, shares[-1]], where="post", color=charts.series(0).colour)
    axes.set(xlim=(0, end), ylim=(-0.03, 1.04), xlabel="L2 radius")
    charts.percent_axis(axes, "certified accuracy")
    if largest is not None:
        axes.axvline(largest, color=charts.MUTED, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
