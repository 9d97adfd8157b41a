"""Robust accuracy over eps, as the figures hold it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Models = Mapping[str, Mapping[str, Any]]


def robust_curve(model: Mapping[str, Any]) -> dict[float, float]:
    """Robust accuracy by eps in rising order; eps 0 is clean accuracy."""
    curve = {float(eps): share for eps, share in (model.get("robust") or {}).items() if share is not None}
    if model.get("clean") is not None:
        curve.setdefault(0.0, model["clean"])
    return dict(sorted(curve.items()))


def training_eps(models: Models) -> float | None:
    """The eps the first hardened model was trained with."""
    return next((model["eps"] for model in models.values() if model.get("eps") is not None), None)
