"""Which attacks a comparison takes: by name, or all of a kind that fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparring import catalog
from sparring.core.errors import UsageError, unknown
from sparring.core.model import Access
from sparring.core.threat import NORMS, Threat, threat

_ACCESS = {"label": Access.DECISION, "score": Access.SCORE, "gradient": Access.GRADIENT}
GROUPS = ("all", *NORMS, *_ACCESS)


@dataclass(frozen=True)
class Selection:
    """The attacks as they are written, and why the others of their group were left out."""

    attacks: tuple[str, ...]
    left_out: dict[str, str]


def select(wanted: Sequence[str], limits: Threat, access: Access, *, bounded: bool, targeted: bool) -> Selection:
    """The attacks that `wanted` names: all, a norm, label, score, gradient, or attacks such as pgd:steps=10.

    Of a group those are left out that do not work in the norm of `limits`, need more than the model's `access`, need
    a target where there is none, or need a radius where nothing bounds the distance. What is named stays.
    """
    named: dict[str, None] = {}
    left_out: dict[str, str] = {}
    known = catalog.attacks()
    for text in _split(wanted):
        if text not in GROUPS:
            catalog.attack(text)
            named[text] = None
            continue
        for name, kind in known.items():
            if text in NORMS and text not in kind.norms:
                continue
            if text in _ACCESS and kind.needs != _ACCESS[text]:
                continue
            reason = _unfit(kind(), limits, access, bounded, targeted)
            if reason is None:
                named[name] = None
            else:
                left_out[name] = reason
    if not named:
        raise UsageError(f"expected an attack that works in {limits.norm} here, found none; see `sparring ls`")
    return Selection(tuple(named), {name: why for name, why in left_out.items() if name not in named})


def norm_of(wanted: Sequence[str]) -> str | None:
    """The norm that a group of `wanted` names, if one does."""
    norms = [text for text in _split(wanted) if text in NORMS]
    if len(set(norms)) > 1:
        raise UsageError(f"expected one norm in a comparison, got {', '.join(norms)}; compare in one after the other")
    return norms[0] if norms else None


def widest(norm: str, x: Tensor, bounds: tuple[float, float]) -> Threat:
    """The threat model of `norm` that lets every image (n, c, h, w) within `bounds` be reached."""
    return threat(norm, threat(norm, 0.0, bounds).farthest(x), bounds)


def _split(wanted: Sequence[str]) -> list[str]:
    """Names set apart by commas, where no options are given."""
    found = [part for text in wanted for part in ([text] if ":" in text else text.split(","))]
    names = [text.strip() for text in found if text.strip()]
    known = (*GROUPS, *catalog.attacks())
    for name in names:
        if ":" not in name and name not in known:
            raise unknown("attack or group", name, known)
    return names


def _unfit(attack: Any, limits: Threat, access: Access, bounded: bool, targeted: bool) -> str | None:
    if limits.norm not in attack.norms:
        return f"works in {', '.join(attack.norms)}"
    if attack.needs > access:
        return f"needs {attack.needs.name.lower()} access"
    if attack.needs_target and not targeted:
        return "needs a target"
    if not bounded and not attack.minimizes:
        return "needs a radius: --eps"
    return None
