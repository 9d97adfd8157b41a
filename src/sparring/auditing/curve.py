"""Robust accuracy over eps, by a few attacks on a few rows: where the audited radius stands on the way down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparring.attacks.fgsm import FGSM
from sparring.attacks.sprint import Sprint
from sparring.attacks.square import Square
from sparring.auditing.hunt import Front, Hunt, Setting
from sparring.core.attack import Attack
from sparring.core.model import Access

ROWS = 32  # at most, of those the model gets right
GRID = (0.125, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)  # of the audited eps
_SALT = 90_000_000


def attacks(setting: Setting) -> dict[str, Attack]:
    """What the curve is drawn by."""
    chosen: dict[str, Attack] = {
        "fgsm": FGSM(),
        "sprint": Sprint(12, loss="log_odds"),
        "square": Square(steps=60, p=0.3, mixed=True),
    }
    fits = {name: a for name, a in chosen.items() if setting.threat.norm in a.norms}
    return {name: a for name, a in fits.items() if a.needs < Access.GRADIENT or setting.gradients}


def measure(setting: Setting, front: Front, clean: float, stop: Callable[[], bool]) -> dict[str, Any] | None:
    """Shares of all rows that hold at each eps, by attack and under the worst; None when time ran out.

    `front` are rows that the model gets right, and `clean` is the share of rows that it gets right: a row that
    falls at one eps has fallen at every larger one.
    """
    count, forward, backward = len(front.y), 0, 0
    if not count:
        return None
    grid = [round(setting.threat.eps * factor, 6) for factor in GRID]
    curves: dict[str, list[float]] = {}
    worst = [torch.ones(count, dtype=torch.bool, device=front.y.device) for _ in grid]
    for number, (name, attack) in enumerate(attacks(setting).items()):
        standing, curve = torch.arange(count, device=front.y.device), []
        for place, eps in enumerate(grid):
            wider = replace(setting, threat=replace(setting.threat, eps=eps))
            hunt = Hunt(wider, front.take(standing))
            hunt.play(attack, _SALT + 100 * number + place)
            if hunt.stopped or stop():
                return None
            forward, backward = forward + int(hunt.forward.sum()), backward + int(hunt.backward.sum())
            standing = standing[~hunt.found]
            curve.append(clean * len(standing) / count)
            worst[place] &= _mask(standing, count)
        curves[name] = curve
    share = [clean * int(row.sum()) / count for row in worst]
    return {
        "eps": [0.0, *grid],
        "curves": {name: [clean, *curve] for name, curve in curves.items()},
        "worst": [clean, *share],
        "rows": count,
        "forward": forward,
        "backward": backward,
    }


def _mask(rows: Tensor, count: int) -> Tensor:
    mask = torch.zeros(count, dtype=torch.bool, device=rows.device)
    mask[rows] = True
    return mask
