"""Robust accuracy over eps, before and after hardening."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes

from sparring.auditing.run import Run
from sparring.reporting import charts
from sparring.reporting.markup import Chart, block, chart, heading, join, paragraph, table
from sparring.reporting.robustness import Models, robust_curve, training_eps
from sparring.reporting.wording import (
    MISSING,
    UPPER_BOUND,
    count,
    duration,
    norm_name,
    number,
    percent,
    plain,
)

ORDER = 70
TITLE = "Hardening"

_LEAD = (
    "Robust accuracy is the share of test images that are named right and stay right under attack, "
    "within the threat model. An image that no attack here broke is undecided, and undecided is never "
    "called robust."
)


def render(run: Run) -> str | None:
    """Robust accuracy over eps for each model, with what the hardening cost."""
    figures = run.figures("defend")
    if not figures:
        return None
    models: Models = figures.get("models") or {}
    curves = {name: curve for name, model in models.items() if (curve := robust_curve(model))}
    norm = norm_name(figures.get("norm", "not recorded"))
    setting = (
        f"{count(figures.get('rows'))} test images, threat model {norm}, "
        f"attack {figures.get('attack', 'not recorded')}."
    )
    parts = [paragraph(_LEAD, "lead"), paragraph(setting, "finding"), _summary(models)]
    reading = block("why", heading("What it says"), _reading(models, curves))
    return join([*parts, block("pair aside", _chart(models, curves), reading)])


def _reading(models: Models, curves: Mapping[str, Mapping[float, float]]) -> Markup:
    """A sentence for each model, and what kind of figure this is."""
    eps = training_eps(models)
    told = []
    for name, curve in curves.items():
        line = f"{name}: clean accuracy {percent(models[name].get('clean'))}"
        if eps is not None and eps in curve:
            line += f", robust accuracy {percent(curve[eps])} at eps {plain(eps)}"
            line += ", the eps it was trained with" * (models[name].get("eps") == eps)
        told.append(Markup("<li>{}.</li>").format(line))
    return join([Markup("<ul>{}</ul>").format(join(told)), paragraph(f"Each figure is {UPPER_BOUND}.")])


def _interval(model: Mapping[str, Any], eps: float) -> tuple[float, float] | None:
    """The 95 % interval at an eps, where there is one."""
    held = {float(key): bounds for key, bounds in (model.get("interval") or {}).items()}
    return tuple(held[eps]) if held.get(eps) else None


def _summary(models: Models) -> Markup:
    """One model a line, at the eps of the training."""
    eps = training_eps(models)
    at = "robust accuracy" if eps is None else f"robust accuracy at eps {plain(eps)}"
    head = ("model", "clean accuracy", at, "trained at eps", "training cost, × standard", "time")
    rows = [
        (
            name,
            percent(model.get("clean")),
            MISSING if eps is None else _with_interval(model, eps),
            plain(model.get("eps")),
            number(model.get("training_cost"), 1),
            duration(model.get("seconds")),
        )
        for name, model in models.items()
    ]
    return table("The models", head, rows)


def _with_interval(model: Mapping[str, Any], eps: float) -> str:
    """Robust accuracy at an eps, with its interval."""
    share = percent(robust_curve(model).get(eps))
    bounds = _interval(model, eps)
    return share if bounds is None else f"{share} (95 %: {percent(bounds[0])} to {percent(bounds[1])})"


def _chart(models: Models, curves: Mapping[str, Mapping[float, float]]) -> Markup:
    """One line a model."""
    told = [
        f"{name}: " + ", ".join(f"{percent(share)} at eps {plain(eps)}" for eps, share in curve.items())
        for name, curve in curves.items()
    ]
    every = sorted({eps for curve in curves.values() for eps in curve})
    rows = [(plain(eps), *(_with_interval(models[name], eps) for name in curves)) for eps in every]
    banded = any(model.get("interval") for model in models.values())
    note = "Eps 0 is clean accuracy." + " Bands: 95 % Clopper-Pearson intervals." * banded
    return chart(
        Chart(
            title="Robust accuracy over eps",
            alt=f"Robust accuracy over eps, an upper bound. {'; '.join(told)}.",
            svg=charts.svg("defend", lambda axes: _draw(axes, models, curves)),
            head=("eps", *curves),
            rows=rows,
            legend=charts.legend(curves),
            note=note,
        )
    )


def _draw(axes: Axes, models: Models, curves: Mapping[str, Mapping[float, float]]) -> None:
    """The lines, their bands, and the eps of the training."""
    for place, (name, curve) in enumerate(curves.items()):
        style = charts.series(place)
        bands = [(eps, *bounds) for eps in curve if (bounds := _interval(models[name], eps))]
        if bands:
            x, low, high = zip(*bands, strict=True)
            axes.fill_between(x, low, high, color=style.colour, alpha=0.18, linewidth=0)
        style.plot(axes, list(curve), list(curve.values()))
    axes.set(ylim=(-0.03, 1.04), xlabel="eps")
    charts.percent_axis(axes, "robust accuracy (upper bound)")
    eps = training_eps(models)
    if eps is not None:
        axes.axvline(eps, color=charts.MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.annotate(
            f"trained at eps {plain(eps)}",
            (eps, 0.5),
            xytext=(-6, 0),
            textcoords="offset points",
            ha="right",
            color=charts.INK,
            fontsize=charts.FONT - 1,
        )
