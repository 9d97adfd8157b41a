"""Chapter 2b: images that are noise to a person and any class you like to a network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparring.attacks.fooling import Fooling
from sparring.core.showing import rounded
from sparring.core.threat import Unbounded
from sparring.data.images import Images, to_bytes
from sparring.demo.stage import CERTAIN, Stage


def tell(stage: Stage) -> None:
    """One image for each class, on both nets, each judged as the 8-bit image that is stored."""
    test = stage.data.test
    goal = torch.arange(len(test.classes))
    grey = torch.full((len(goal), *test.x.shape[1:]), 0.5)
    # A noise image has no true class: any label other than the goal serves.
    blank = Images("grey", grey, (goal + 1) % len(goal), goal, test.classes)
    nets: dict[str, list[dict[str, Any]]] = {}
    classic: dict[str, int] = {}
    tensors: dict[str, Tensor] = {}
    for net in ("dense", "conv"):
        outcome = stage.attack(net, Fooling(), Unbounded(), blank, goal, CERTAIN, eight_bit=True)
        plain = stage.attack(net, Fooling(loss="quadratic"), Unbounded(), blank, goal, CERTAIN, eight_bit=True)
        nets[net] = [
            {
                "goal": g,
                "confidence": float(outcome.confidence[g]) if outcome.label[g] == g else 0.0,
                "steps": int(outcome.backward[g]),
                "reached": bool(outcome.found[g]),
            }
            for g in goal.tolist()
        ]
        classic[net] = int(plain.found.sum())
        tensors[net] = to_bytes(outcome.best)
    figures = {
        "steps": Fooling().steps,
        "lambda": 0.0,
        "threshold": CERTAIN,
        "min_confidence": min(entry["confidence"] for entries in nets.values() for entry in entries),
        "reached": sum(entry["reached"] for entries in nets.values() for entry in entries),
        "classic_reached": classic,
        "nets": nets,
    }
    stage.record("fooling", {**figures, "min_confidence": rounded(figures["min_confidence"], 9)}, tensors)
