"""Bars that an audit must clear, each an error with an exit code of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparring.auditing.run import Run
from sparring.core.errors import GateError, IncompleteError, UsageError

_SAME = ("data_digest", "threat", "rows")


def check_bar(figures: Mapping[str, Any], bar: float | None) -> None:
    """`GateError` when not even the upper end of robust accuracy reaches the bar."""
    upper = figures["robust_accuracy"]["upper"]
    if bar is not None and upper < bar:
        raise GateError(f"robust accuracy is at most {upper:.4f}, expected {bar:g} or more (--fail-under)")


def check_baseline(figures: Mapping[str, Any], run: Run, baseline: Run | None, drop: float) -> None:
    """`GateError` when the upper end lies more than `drop` below that of an earlier audit of the same rows."""
    if baseline is None:
        return
    earlier = baseline.figures("audit")
    if earlier is None:
        raise UsageError(f"{baseline.path}: expected the run folder of an audit, got one of another command")
    different = [key for key in _SAME if baseline.plan.get(key) != run.plan.get(key)]
    if different:
        raise UsageError(
            f"{baseline.path}: made with another {', '.join(different)}, so its figure cannot be compared"
        )
    was, now = earlier["robust_accuracy"]["upper"], figures["robust_accuracy"]["upper"]
    if now < was - drop - 1e-12:
        raise GateError(
            f"robust accuracy is at most {now:.4f}, and was {was:.4f} in {baseline.path}; "
            f"expected a drop of no more than {drop:g} (--max-drop)"
        )


def check_finished(figures: Mapping[str, Any], budgeted: bool) -> None:
    """`IncompleteError` when rows have no verdict because the model failed, or a run without a budget stopped."""
    failed = figures["counts"]["error"]
    if failed:
        raise IncompleteError(f"{failed} of {figures['rows']} rows have no verdict: the model failed on them")
    if not figures["complete"] and not budgeted:
        raise IncompleteError(f"the audit is not complete; the same command with --out {figures['run']} goes on")
