"""Robust accuracy over eps, by a few quick attacks, with the audited eps marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes

from sparring.auditing.intervals import clopper_pearson
from sparring.auditing.run import Run
from sparring.reporting import charts
from sparring.reporting.markup import Chart, block, chart, heading, join, paragraph
from sparring.reporting.wording import count, percent, plain, span

ORDER = 81
TITLE = "Over eps"

Curves = Mapping[str, Sequence[float]]
_WORST = "the worst of them"
_FAINT = 0.25
_INTERVAL = "the audit’s interval"


def render(run: Run) -> str | None:
    """The curves and the audit's own interval, and how far each is to be trusted."""
    figures = run.figures("curve")
    if not figures or not figures.get("eps"):
        return None
    eps: list[float] = figures["eps"]
    curves: Curves = {**(figures.get("curves") or {}), _WORST: figures.get("worst") or []}
    curves = {name: shares for name, shares in curves.items() if len(shares) == len(eps)}
    audit, audited = run.figures("audit") or {}, run.plan.get("eps")
    ends = audit.get("robust_accuracy") or {}
    bar = None
    if audited is not None and ends.get("lower") is not None and ends.get("upper") is not None:
        bar = (float(audited), float(ends["lower"]), float(ends["upper"]))
    lead = (
        "Robust accuracy falls as eps grows, and where it stands at the audited eps depends on where that lies "
        "on the way down. Where eps is large enough to allow any image, no useful model holds."
    )
    why = block("why", heading("How to read it"), *_reading(figures, audit, bar))
    return join([paragraph(lead, "lead"), block("pair aside", _chart(eps, curves, bar), why)])


def _reading(
    figures: Mapping[str, Any], audit: Mapping[str, Any], bar: tuple[float, float, float] | None
) -> list[Any]:
    """On how many images, what kind of figure it is, and how it goes with the audit's own."""
    rows = figures.get("rows") or 0
    low, high = clopper_pearson(rows // 2, rows) if rows else (0.0, 1.0)
    told = [
        f"Drawn on {count(rows)} of the images that the model gets right, and scaled to its clean accuracy. "
        f"So few images leave an error of up to {100 * (high - low) / 2:.0f} points either way (95 %).",
        "Each point is an upper bound for the images it is drawn on: these attacks are few and quick, and a "
        "stronger one may break more.",
    ]
    if bar is not None:
        told.append(
            f"The vertical bar is the audit itself at eps {plain(bar[0])}, {span(*bar[1:])} on "
            f"{count(audit.get('rows'))} images. It searched longer and on all of them: quote it, not the curve."
        )
    return [paragraph(line) for line in told]


def _chart(eps: Sequence[float], curves: Curves, bar: tuple[float, float, float] | None) -> Markup:
    """One line an attack, one for the worst of them, and the bar of the audit."""
    told = [
        f"{name}: " + ", ".join(f"{percent(share)} at eps {plain(at)}" for at, share in zip(eps, shares, strict=True))
        for name, shares in curves.items()
    ]
    if bar is not None:
        told.append(f"{_INTERVAL} at eps {plain(bar[0])}: {span(*bar[1:])}")
    marks = [charts.mark("M1 7h33", _WORST, 7, _FAINT)] if _WORST in curves else []
    marks += [] if bar is None else [charts.mark("M12 1.5h11M17.5 1.5v11M12 12.5h11", _INTERVAL)]
    return chart(
        Chart(
            title="Robust accuracy over eps, upper bounds",
            alt=f"Robust accuracy over eps. {'; '.join(told)}.",
            svg=charts.svg("curve", lambda axes: _draw(axes, eps, curves, bar)),
            head=("eps", *curves),
            rows=[(plain(at), *(percent(s[place]) for s in curves.values())) for place, at in enumerate(eps)],
            legend=charts.legend([name for name in curves if name != _WORST], *marks),
            note="Eps 0 is clean accuracy.",
        )
    )


def _draw(axes: Axes, eps: Sequence[float], curves: Curves, bar: tuple[float, float, float] | None) -> None:
    """The lines; the audited eps as a dashed line, and the interval on it."""
    for place, (name, shares) in enumerate(curves.items()):
        if name == _WORST:
            axes.plot(eps, shares, color=charts.INK, linewidth=7, alpha=_FAINT, solid_capstyle="round", zorder=1.5)
        else:
            charts.series(place).plot(axes, eps, shares)
    axes.set(ylim=(-0.03, 1.04), xlabel="eps")
    charts.percent_axis(axes, "robust accuracy (upper bound)")
    if bar is None:
        return
    at, low, high = bar
    axes.axvline(at, color=charts.MUTED, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    axes.plot([at, at], [low, high], color=charts.INK, linewidth=2.5, marker="_", markersize=13, markeredgewidth=2.5)
    axes.annotate(
        f"audited: eps {plain(at)}",
        (at, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="center",
        color=charts.INK,
        fontsize=charts.FONT - 1,
    )
