"""Certified accuracy below the empirical one, who proved what, and how far the proofs reach towards the attacks."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from markupsafe import Markup
from matplotlib.axes import Axes
from torch import Tensor

from sparring.auditing.run import Run
from sparring.reporting import charts
from sparring.reporting.markup import Chart, block, chart, heading, join, paragraph, table
from sparring.reporting.wording import count, duration, norm_name, percent, plain

ORDER = 81
TITLE = "What is proved"

Figures = Mapping[str, Any]
_LEAD = (
    "A proof says that no image within eps is read as anything else, whatever attack may yet be invented. It is "
    "computed in 64-bit arithmetic over the whole ball, and counts only where it is above what the model’s own "
    "rounding can take away."
)
_SHADE = 0.22
_SHOWN = 12  # lines of the curve's table
_BINS = 20


@dataclass(frozen=True)
class Curves:
    """Shares of all images over eps: proved from below, and not broken by attacks from above."""

    eps: list[float]
    certified: list[float]  # holds at its eps, and back to the one before
    attacked_eps: list[float]
    attacked: list[float]  # holds from its eps on
    end: float

    def at(self, eps: float) -> tuple[float, float]:
        """The lower and the upper end at `eps`."""
        place = bisect_left(self.eps, eps)
        low = self.certified[place] if place < len(self.eps) else 0.0
        return low, max(low, self.attacked[max(0, bisect_right(self.attacked_eps, eps) - 1)])


def render(run: Run) -> str | None:
    """The two curves and what is unknown between them, the methods, the radii; None if no proof was asked for."""
    figures = run.figures("certify") or run.figures("audit") or {}
    proofs = figures.get("proofs")
    if not proofs:
        return None
    parts: list[object] = [paragraph(_LEAD, "lead")]
    if proofs.get("why_not"):
        return join([*parts, paragraph(f"Nothing could be proved of this model. {_sentence(proofs['why_not'])}")])
    parts += [paragraph(_finding(figures, proofs), "finding"), _methods(proofs)]
    curves = _curves(figures, proofs, run.plan.get("eps"))
    if curves is not None:
        why = block("why", heading("How to read it"), *map(paragraph, _reading(figures, curves, run.plan)))
        parts.append(block("pair aside", _chart(curves, run.plan), why))
    spent = None if figures.get("empirical") else _bought(proofs.get("bought") or {})
    if spent is not None:
        parts.append(spent)
    if figures.get("radius") and (radius := _radii(run)) is not None:
        parts.append(_histogram(*radius, str(norm_name(run.plan.get("norm")))))
    return join(parts)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _finding(figures: Figures, proofs: Figures) -> str:
    """How many rows are proved, and whether somebody tried to contradict that."""
    certified, rows = (figures.get("counts") or {}).get("certified", 0), figures.get("rows") or 0
    if not proofs["methods"]:
        return (
            "No proof was tried: a first attack broke half of a sample, and this profile then spends no time on it."
        )
    share = percent(certified / rows if rows else None)
    told = f"{count(certified)} of {count(rows)} images are proved robust ({share})."
    if spot := proofs.get("spot_checked"):
        told += f" As a check on the proofs themselves, {count(spot)} of these were attacked all the same; none fell."
    elif figures.get("empirical"):
        told += (
            " As a check on the proofs themselves, all images were attacked at several eps: none fell within its own."
        )
    return told


def _methods(proofs: Figures) -> Markup | str:
    """Who proved how many rows at what cost."""
    lines = []
    for one in proofs["methods"]:
        rows, certified, seconds = one["rows"], one["certified"], one["seconds"]
        each = duration(seconds / rows) if rows else "–"
        share = percent(certified / rows) if rows else "–"
        lines.append((one["method"], count(rows), count(certified), share, duration(seconds), each))
    head = ("method", "images met", "proved", "share", "time", "time per image")
    return table("Who proved what", head, lines) if lines else ""


def _curves(figures: Figures, proofs: Figures, eps: float | None) -> Curves | None:
    """Both curves: the upper from smallest changes, from a quick attack at several eps, or from the audit's end."""
    own = proofs.get("curve")
    if not own or not eps:
        return None
    upper = (figures.get("distances") or {}).get("curve") or (figures.get("empirical") or {}).get("curve")
    end = max(2 * eps, 1.2 * own["eps"][-1])
    if upper is None:
        ends = figures.get("robust_accuracy") or {}
        if ends.get("upper") is None or figures.get("clean_accuracy") is None:
            return None
        upper = {"eps": [0.0, eps], "robust_accuracy": [figures["clean_accuracy"], ends["upper"]]}
    else:
        told = zip(upper["eps"], upper["robust_accuracy"], strict=True)
        end = max(end, next((min(at, 4 * eps) for at, share in told if share < 0.05), 4 * eps))
    return Curves(own["eps"], own["certified"], upper["eps"], upper["robust_accuracy"], end)


def _reading(figures: Figures, curves: Curves, plan: Figures) -> list[str]:
    """What lies in the band, and where either line comes from."""
    eps = plan["eps"]
    low, high = curves.at(eps)
    told = [
        f"At eps {plain(eps)} {percent(low)} are proved and {percent(high)} not broken. The {percent(high - low)} "
        "between are unknown: a better proof raises the lower line, a stronger attack lowers the upper one, and the "
        "truth lies between them."
    ]
    if figures.get("radius"):
        told.append(
            "The lower line comes from the largest eps that could be proved for each image, to one part in 32; its "
            f"median is {plain(_short(figures['radius']['median']))}."
        )
    else:
        told.append(
            f"Images were proved at eps {plain(eps)} alone, and what is proved there holds at every smaller eps. "
            "Beyond it nothing was tried (sparring certify --radius does)."
        )
    if figures.get("distances"):
        told.append("The upper line comes from the smallest change found for each image.")
    elif figures.get("empirical"):
        far = figures["empirical"]["furthest"]
        told.append(f"The upper line comes from a quick attack at several eps, up to {plain(far)}.")
    else:
        told.append("The upper line falls once, at the audited eps: nobody attacked at another.")
    return told


def _chart(curves: Curves, plan: Figures) -> Markup:
    """Two steps, and the band between them."""
    grid = sorted({at for at in (*curves.eps, *curves.attacked_eps, plan["eps"]) if at <= curves.end})
    shown = [grid[round(place * (len(grid) - 1) / (_SHOWN - 1))] for place in range(_SHOWN)]
    rows = [(at, *curves.at(at)) for at in sorted({*shown, plan["eps"]})]
    told = ", ".join(f"{percent(low)} to {percent(high)} at eps {plain(_short(at))}" for at, low, high in rows)
    band = charts.mark("M1 7h33", "unknown", 9, _SHADE)
    return chart(
        Chart(
            title="Robust accuracy over eps, from below and from above",
            alt=f"Robust accuracy over eps, proved to not broken: {told}.",
            svg=charts.svg("certified", lambda axes: _draw(axes, curves, plan["eps"])),
            head=("eps", "proved", "not broken", "unknown"),
            rows=[(plain(_short(at)), percent(low), percent(high), percent(high - low)) for at, low, high in rows],
            legend=charts.legend(["proved", "not broken by attacks"], band),
        )
    )


def _short(eps: float) -> float:
    return float(f"{eps:.4g}")


def _draw(axes: Axes, curves: Curves, eps: float) -> None:
    grid = [0.0, *sorted({at for at in (*curves.eps, *curves.attacked_eps) if 0 < at < curves.end}), curves.end]
    low, high, x = [], [], []
    for before, after in pairwise(grid):  # constant within: read off in the middle
        ends = curves.at((before + after) / 2)
        x += [before, after]
        low += [ends[0]] * 2
        high += [ends[1]] * 2
    axes.fill_between(x, low, high, color=charts.INK, alpha=_SHADE, linewidth=0)
    proved, attacked = charts.series(0), charts.series(1)
    axes.plot(x, low, color=proved.colour)
    axes.plot(x, high, color=attacked.colour, dashes=attacked.dashes)
    axes.axvline(eps, color=charts.MUTED, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    axes.set(xlim=(0, curves.end), ylim=(-0.03, 1.04), xlabel="eps")
    charts.percent_axis(axes, "robust accuracy")
    axes.annotate(
        f"eps {plain(eps)}",
        (eps, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="center",
        color=charts.INK,
        fontsize=charts.FONT - 1,
    )


def _bought(told: Figures) -> Markup | None:
    """Both ends of the interval over the time spent on proofs and attacks; None if nothing moved."""
    seconds, low, high = (told.get(name) or [] for name in ("seconds", "certified", "not_broken"))
    if len(set(low)) < 2 or seconds[-1] <= 0:
        return None
    scale, unit = (60.0, "minutes") if seconds[-1] > 120 else (1.0, "seconds")
    at = [second / scale for second in seconds]
    shown = sorted({bisect_right(seconds, seconds[-1] * place / (_SHOWN - 1)) - 1 for place in range(_SHOWN)} - {-1})
    rows = [(duration(seconds[place]), percent(low[place]), percent(high[place])) for place in shown]

    def draw(axes: Axes) -> None:
        axes.fill_between(at, low, high, step="post", color=charts.INK, alpha=_SHADE, linewidth=0)
        proved, attacked = charts.series(0), charts.series(1)
        axes.step(at, low, where="post", color=proved.colour)
        axes.step(at, high, where="post", color=attacked.colour, dashes=attacked.dashes)
        axes.set(xlim=(0, at[-1]), ylim=(-0.03, 1.04), xlabel=f"{unit} of work")
        charts.percent_axis(axes, "robust accuracy")

    half = bisect_right(seconds, seconds[-1] / 2) - 1
    late = paragraph(
        "Cheap bounds come first, then the attacks, then branch and bound on what they leave. In "
        f"{duration(seconds[-1])} {percent(low[-1])} were proved, {percent(low[-1] - low[half])} of all in the "
        "second half of that time: where the lower line still rises at its end, more time buys more."
    )
    drawn = chart(
        Chart(
            title="What the time bought",
            alt="Proved to not broken, over time: "
            + ", ".join(f"{one} to {other} after {time}" for time, one, other in rows)
            + ".",
            svg=charts.svg("bought", draw),
            head=("after", "proved", "not broken"),
            rows=rows,
            legend=charts.legend(["proved", "not broken by attacks"], charts.mark("M1 7h33", "unknown", 9, _SHADE)),
        )
    )
    return block("pair aside", drawn, block("why", heading("How to read it"), late))


def _radii(run: Run) -> tuple[Tensor, Tensor] | None:
    """(n,) certified radii and (n,) smallest attacks of the rows that have both."""
    held = run.tensors("empirical")
    if "radius" not in held:
        return None
    radius, fallen = held["radius"], held["fallen"]
    both = (radius >= 0) & (fallen < torch.inf) & (fallen > 0)
    return (radius[both], fallen[both]) if bool(both.any()) else None


def _histogram(radius: Tensor, fallen: Tensor, norm: str) -> Markup:
    """Which share of the way to the smallest attack is proved, row by row."""
    share = (radius / fallen).clamp(0, 1)
    rows = torch.histc(share, _BINS, 0.0, 1.0).long().tolist()
    told = ", ".join(f"{count(held)} at {place * 5} to {place * 5 + 5} %" for place, held in enumerate(rows) if held)

    def draw(axes: Axes) -> None:
        edges = [place / _BINS for place in range(_BINS)]
        colour = charts.series(0).colour
        axes.bar(edges, rows, width=1 / _BINS, align="edge", color=colour, edgecolor=charts.CARD)
        axes.set(xlim=(0, 1), ylabel="images")
        charts.percent_axis(axes, "proved, of the way to the smallest change found", "x")

    return chart(
        Chart(
            title="How far the proofs reach towards the attacks",
            alt=f"Images by the largest {norm} radius proved over the smallest change found: {told}.",
            svg=charts.svg("reach-proved", draw),
            head=("proved, of the way", "images"),
            rows=[(f"{place * 5} to {place * 5 + 5} %", count(held)) for place, held in enumerate(rows)],
            note="Of the images that have both. At 100 % nothing is left unknown about an image.",
        )
    )
