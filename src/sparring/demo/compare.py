"""Chapter 3: the attacks side by side on the same rows."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from sparring.attacks.apgd import APGD
from sparring.attacks.ddn import DDN
from sparring.attacks.fgsm import FGSM
from sparring.attacks.fooling import Fooling
from sparring.attacks.pgd import PGD
from sparring.comparison import Entry
from sparring.core.attack import Attack
from sparring.core.threat import Linf, Threat, Unbounded
from sparring.demo.stage import Stage

NET = "conv"


def tell(stage: Stage) -> None:
    """Three attacks within a budget, and two that look for the nearest image."""
    threat = Linf(stage.scale.small)
    entries = [
        _entry(stage, "fgsm", FGSM(), threat),
        _entry(stage, "pgd", PGD(steps=40), threat),
        _entry(stage, "apgd", APGD(steps=100), threat),
        _entry(stage, "classic", Fooling(lam=0.5, loss="quadratic", step_size=0.1), Unbounded(), aimed=True),
        _entry(stage, "ddn", DDN(steps=100), Unbounded()),
    ]
    figures = {"net": NET, "rows": len(stage.rows), "threat": threat.describe(), "attacks": entries}
    stage.record("compare", figures)


def _entry(stage: Stage, name: str, attack: Attack, threat: Threat, aimed: bool = False) -> dict[str, Any]:
    rows = stage.rows
    target = (rows.y + 1) % len(rows.classes) if aimed else None
    begin = time.perf_counter()
    outcome = stage.attack(NET, attack, threat, rows, target)
    return asdict(Entry.of(name, attack, threat, outcome, rows.x, time.perf_counter() - begin))
