"""Figures and names as a person reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from decimal import ROUND_DOWN, Decimal
from typing import Any

MISSING = "–"
UPPER_BOUND = "accuracy under the attacks tried here: an upper bound on the true robust accuracy"
_DATA = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10", "digits": "Digits"}
_NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1", "l0": "L0"}
_NETS = {"dense": "dense network", "conv": "convolutional network"}


def percent(value: float | None, digits: int = 1) -> str:
    """A share in percent, with more digits rather than a false 0 % or 100 %."""
    if value is None:
        return MISSING
    text = f"{100 * value:.{digits}f}"
    if 0 < value < 1 and float(text) in (0.0, 100.0) and digits < 6:
        return percent(value, digits + 1)
    return f"{text} %"


def span(low: float | None, high: float | None) -> str:
    """An interval of shares in percent; one figure where its ends agree."""
    if low is None or high is None:
        return MISSING
    return percent(low) if low == high else f"{percent(low)} to {percent(high)}"


def confidence(value: float | None) -> str:
    """A confidence in percent, rounded down, so that no softmax is ever called certain."""
    if value is None:
        return MISSING
    exact = 100 * Decimal(f"{value:.7g}")  # what a 32-bit float is sure of
    if exact >= 100:
        return "> 99.99 %"
    return f"{exact.quantize(Decimal('0.01' if exact >= 99 else '0.1'), ROUND_DOWN)} %"


def brief_confidence(value: float | None) -> str:
    """A confidence in as few letters as a small tile holds, rounded down."""
    if value is None:
        return MISSING
    return f"{min(int(100 * value), 99)} %" if value >= 0.01 else "< 1 %"


def number(value: float | None, digits: int = 2) -> str:
    """A figure with a fixed number of digits."""
    return MISSING if value is None else f"{value:,.{digits}f}"


def count(value: int | None) -> str:
    """A whole number, its thousands set apart."""
    return MISSING if value is None else f"{value:,}"


def plain(value: float | None) -> str:
    """A setting as it was typed: 0.3, not 0.300000."""
    return MISSING if value is None else f"{value:g}"


def duration(seconds: float | None) -> str:
    """Seconds with two useful digits."""
    if seconds is None:
        return MISSING
    return f"{seconds:,.0f} s" if seconds >= 100 else f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2g} s"


def data_name(plan: Mapping[str, Any]) -> str:
    """The data set as its makers write it."""
    name = str(plan.get("data", "an unnamed data set"))
    return _DATA.get(name, name)


def net_name(key: object) -> str:
    """A network's name in words."""
    return _NETS.get(str(key), str(key))


def norm_name(key: object) -> str:
    """A norm as the field writes it."""
    return _NORMS.get(str(key).lower(), str(key))


def threat_name(plan: Mapping[str, Any]) -> str:
    """The threat model of a run, such as `Linf eps 0.3`."""
    if "norm" not in plan or plan.get("eps") is None:
        return str(plan.get("threat", "a threat model not recorded"))
    return f"{norm_name(plan['norm'])} eps {plain(plan['eps'])}"


def class_namer(plan: Mapping[str, Any]) -> Callable[[object], str]:
    """A function from a label to the name of its class."""
    classes: Sequence[object] = plan.get("classes") or []

    def name(label: object) -> str:
        if isinstance(label, int) and 0 <= label < len(classes):
            return str(classes[label])
        return MISSING if label is None else str(label)

    return name
