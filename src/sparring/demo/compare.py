"""Chapter 3: the attacks side by side on the same rows."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from sparring.attacks.apgd import APGD
from sparring.attacks.ddn import DDN
from sparring.attacks.fgsm import FGSM
from sparring.attacks.fooling import Fooling
from sparring.attacks.pgd import PGD
from sparring.comparison import Entry, trial
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
    done = trial(
        stage.model(NET),
        rows.x.to(stage.device),
        rows.y.to(stage.device),
        attack,
        threat,
        target=(rows.y + 1).to(stage.device) % len(rows.classes) if aimed else None,
        sample=rows.ids.to(stage.device),
        seed=stage.seed,
        on_progress=lambda settled, of: stage.tick(f"{name} on {NET}", settled, of),
    )
    return asdict(Entry.of(replace(done, name=name), threat, rows.x))
