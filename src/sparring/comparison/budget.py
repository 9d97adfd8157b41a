"""What an attack costs, measured, and how many of its steps a budget of passes pays for."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from sparring.core.attack import Attack
from sparring.core.errors import UsageError
from sparring.core.model import Access
from sparring.testing import puzzle

_FEW, _MORE = 4, 8  # steps of the two runs that a step's price is taken from


def passes(attack: Attack, norm: str | None = None) -> int:
    """Forward and backward passes that the attack spends, at most, on a row of a small puzzle; the clean query apart.

    The puzzle has images of 20 pixels and 4 classes, of which an attack breaks some and others not: an attack whose
    cost grows with either may cost more elsewhere. `steps` are not all played: their price is measured.
    """
    if not _stepped(attack):
        return _played(attack, norm)
    steps: int = attack.steps  # type: ignore[attr-defined]  # `_stepped` has looked
    if attack.needs < Access.GRADIENT:
        return steps
    base, price = _price(attack, norm)
    return round(base + price * steps)


def fitted(attack: Attack, norm: str, budget: int) -> Attack:
    """The attack with as many `steps` as `budget` passes a row pay for; one without steps as it is.

    Where labels or scores are all it sees, `steps` are queries already. The engine holds every row to the budget,
    whatever is computed here.
    """
    if budget < 2:
        raise UsageError(f"expected a budget of at least 2 passes a row, one step, got {budget}")
    if not _stepped(attack):
        return attack
    if attack.needs < Access.GRADIENT:
        return _with(attack, budget)
    base, price = _price(attack, norm)
    return _with(attack, max(1, int((budget - base) / price)) if price > 0 else budget // 2)


def _stepped(attack: Any) -> bool:
    return "steps" in {field.name for field in fields(attack)}


def _with(attack: Any, steps: int) -> Attack:
    changed: Attack = replace(attack, steps=steps)
    return changed


def _price(attack: Attack, norm: str | None) -> tuple[float, float]:
    """What the attack costs without steps, and what each step adds."""
    few, more = (_played(_with(attack, steps), norm) for steps in (_FEW, _MORE))
    price = (more - few) / (_MORE - _FEW)
    return few - _FEW * price, price


def _played(attack: Attack, norm: str | None) -> int:
    outcome = puzzle(norm or attack.norms[0], targeted=attack.needs_target).play(attack)
    return int((outcome.forward + outcome.backward).max())
