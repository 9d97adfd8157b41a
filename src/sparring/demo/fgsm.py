"""Chapter 2a: the fast gradient sign method, one step that a person hardly sees."""

from __future__ import annotations

import torch

from sparring.attacks.fgsm import FGSM
from sparring.core.showing import rounded
from sparring.core.threat import Linf
from sparring.data.images import to_bytes
from sparring.demo.stage import Stage

SHOWN = 6


def tell(stage: Stage) -> None:
    """Attack `conv`; show the first rows that fall."""
    rows, threat = stage.rows, Linf(stage.scale.small)
    outcome = stage.attack("conv", FGSM(), threat, rows)
    fell = (outcome.found & ~outcome.clean).nonzero().squeeze(1)[:SHOWN]
    shown = [
        {
            "label": int(rows.y[i]),
            "prediction": int(outcome.clean_label[i]),
            "confidence": rounded(float(outcome.clean_confidence[i])),
            "adversarial_prediction": int(outcome.label[i]),
            "adversarial_confidence": rounded(float(outcome.confidence[i])),
        }
        for i in fell.tolist()
    ]
    x, best = rows.x[fell.cpu()], outcome.best[fell].cpu()
    tensors = {"x": to_bytes(x), "adversarial": to_bytes(best), "sign": (best - x).sign().to(torch.int8)}
    figures = {
        "net": "conv",
        "eps": threat.eps,
        "rows": len(rows),
        "success": rounded(outcome.success_rate),
        "shown": shown,
        "rule": "the first test images that fall",
    }
    stage.record("fgsm", figures, tensors)
