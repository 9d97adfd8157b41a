"""Robust accuracy over eps, before and after hardening."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes

from sparring.auditing.run import Run
from sparring.reporting import charts
from sparring.reporting.markup import Chart, chart, join, paragraph, table
from sparring.reporting.wording import MISSING, UPPER_BOUND, count, duration, number, percent, plain

ORDER = 70
TITLE = "Hardening, and what it buys"

Models = Mapping[str, Mapping[str, Any]]
_LEAD = (
    "Robust accuracy is the share of test images that are named right and stay right under attack, within the threat "
    "model. An image that no attack here broke is undecided; undecided is never called robust."
)


def render(run: Run) -> str | None:
    """Robust accuracy over eps for each model, with what the hardening cost."""
    figures = run.figures("defend")
    if not figures:
        return None
    models: Models = figures.get("models") or {}
    curves = {name: curve for name, model in models.items() if (curve := robust_curve(model))}
    setting = (
        f"{count(figures.get('rows'))} test images, threat model {figures.get('norm', 'not recorded')}, "
        f"attack {figures.get('attack', 'not recorded')}. Every figure is {UPPER_BOUND}."
    )
    parts = [paragraph(_LEAD, "lead"), paragraph(setting, "finding"), _summary(models)]
    return join([*parts, _chart(models, curves)] if curves else parts)


def robust_curve(model: Mapping[str, Any]) -> dict[float, float]:
    """Robust accuracy by eps in rising order; eps 0 is clean accuracy."""
    curve = {float(eps): share for eps, share in (model.get("robust") or {}).items() if share is not None}
    if model.get("clean") is not None:
        curve.setdefault(0.0, model["clean"])
    return dict(sorted(curve.items()))


def training_eps(models: Models) -> float | None:
    """The eps the first hardened model was trained with."""
    return next((model["eps"] for model in models.values() if model.get("eps") is not None), None)


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
    rows = [
        (plain(eps), *(_with_interval(models[name], eps) for name in curves))
        for eps in every
    ]
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
            f"trained at eps {plain(eps)} ",
            (eps, 0.5),
            ha="right",
            color=charts.INK,
            fontsize=charts.FONT - 1,
        )
