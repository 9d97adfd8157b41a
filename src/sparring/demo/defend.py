"""Chapter 4: harden the net, and see how far it holds."""

from __future__ import annotations

from typing import Any

import torch

from sparring.attacks.apgd import APGD
from sparring.attacks.pgd import PGD
from sparring.auditing.intervals import clopper_pearson
from sparring.core.model import Access
from sparring.core.showing import rounded
from sparring.core.threat import Linf
from sparring.data.images import Images
from sparring.defenses.madry import Madry
from sparring.demo.stage import Stage
from sparring.demo.train import train_one

ATTACKS = (APGD(steps=50), APGD(steps=50, loss="dlr"))
POINTS = 8


def tell(stage: Stage) -> None:
    """Madry training of `conv`, then both nets against the same attacks over a range of eps."""
    scale = stage.scale
    stage.say(f"hardening conv by adversarial training at eps {scale.eps:g}")
    defense = Madry(PGD(steps=7), Linf(scale.eps))
    card = train_one(stage, "madry", stage.settings("conv", scale.hardening_steps), defense).card
    plain = stage.figures["train"]["conv"]
    cost = (card["seconds"] / card["steps"]) / max(plain["seconds"] / plain["steps"], 1e-9)
    grid = [round(scale.eps * (i + 1) / (POINTS - 2), 3 if scale.eps > 0.1 else 4) for i in range(POINTS)]
    models = {
        "undefended": _curve(stage, "conv", grid) | {"seconds": plain["seconds"], "training_cost": 1.0},
        "madry": _curve(stage, "madry", grid)
        | {
            "eps": scale.eps,
            "recipe": repr(defense),
            "seconds": card["seconds"],
            "training_cost": rounded(cost, 2),
        },
    }
    figures = {
        "net": "conv",
        "norm": "linf",
        "rows": len(stage.rows),
        "attack": "the worst of " + " and ".join(f"{a.name} ({a.loss}, {a.steps} steps)" for a in ATTACKS),
        "eps": [0.0, *grid],
        "models": models,
    }
    stage.record("defend", figures)


def _curve(stage: Stage, net: str, grid: list[float]) -> dict[str, Any]:
    """Clean and robust accuracy; a row that falls at one eps has fallen at every larger one."""
    rows: Images = stage.rows
    correct = stage.model(net).query(rows.x.to(stage.device), Access.DECISION).labels.cpu() == rows.y
    standing = correct.nonzero().squeeze(1)
    robust: dict[str, float] = {}
    interval: dict[str, list[float]] = {}
    for eps in grid:
        for attack in ATTACKS:
            if len(standing):
                outcome = stage.attack(net, attack, Linf(eps), rows.select(standing))
                standing = standing[~outcome.found.cpu()]
        robust[f"{eps:g}"] = round(len(standing) / len(rows), 6)
        interval[f"{eps:g}"] = [round(end, 6) for end in clopper_pearson(len(standing), len(rows))]
    return {"clean": rounded(torch.sum(correct).item() / len(rows)), "robust": robust, "interval": interval}
