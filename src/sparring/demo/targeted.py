"""Chapter 2c and 3: a person sees one digit, the network another; the classic way and a better one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparring.attacks.ddn import DDN
from sparring.attacks.fooling import Fooling
from sparring.core.attack import Attack
from sparring.core.showing import mean, rounded
from sparring.core.threat import Unbounded
from sparring.data.images import Images, to_bytes
from sparring.demo.stage import CERTAIN, Stage
from sparring.engine.outcome import Outcome
from sparring.training.fit import score

NET, STEPS, LAMBDA = "conv", 500, 0.5


def tell(stage: Stage) -> None:
    """Every (source, goal) pair of classes, each image judged as it is stored, in 8 bits."""
    sources = _sources(stage)
    k = len(sources)
    source, goal = (torch.tensor(part) for part in zip(*_pairs(k), strict=True))
    pairs = sources.select(source)
    classic_attack = Fooling(steps=STEPS, lam=LAMBDA, loss="quadratic", step_size=0.1)
    better_attack = DDN(steps=STEPS, loss="log_odds")

    def attempt(attack: Attack, confidence: float) -> Outcome:
        return stage.attack(NET, attack, Unbounded(), pairs, goal, confidence, eight_bit=True)

    classic, better = attempt(classic_attack, CERTAIN), attempt(better_attack, CERTAIN)
    named = attempt(classic_attack, 0.0), attempt(better_attack, 0.0)
    both = named[0].found & named[1].found
    figures = {
        "net": NET,
        "threshold": CERTAIN,
        "steps": STEPS,
        "lambda": LAMBDA,
        "classic": {"method": "fooling", **_figures(classic, source, goal)},
        "improved": {"method": "ddn", **_figures(better, source, goal)},
        "named": {
            "both_pairs": int(both.sum()),
            "classic_pairs": int(named[0].found.sum()),
            "improved_pairs": int(named[1].found.sum()),
            "classic_confidence": mean(named[0].confidence[named[0].found]),
            "classic_mean_l2": mean(named[0].distance[both]),
            "improved_mean_l2": mean(named[1].distance[both]),
        },
    }
    tensors = {"sources": to_bytes(sources.x)}
    for word, outcome in (("classic", classic), ("improved", better)):
        tensors[word] = _grid(sources.x, outcome.best.cpu(), source, goal)
    stage.record("targeted", figures, tensors)


def _pairs(k: int) -> list[tuple[int, int]]:
    return [(s, g) for s in range(k) for g in range(k) if s != g]


def _sources(stage: Stage) -> Images:
    """The first test image of each class that the net gets right; where it gets none right, the first one."""
    test = stage.data.test
    right = score(stage.model(NET), test, stage.device).labels == test.y
    index = []
    for c in range(len(test.classes)):
        wanted = test.y == c
        best = next((mask for mask in (right & wanted, wanted) if mask.any()), torch.ones_like(wanted))
        index.append(int(best.nonzero()[0]))
    return test.select(torch.tensor(index))


def _figures(outcome: Outcome, source: Tensor, goal: Tensor) -> dict[str, Any]:
    said = outcome.label.cpu() == goal
    cells = [
        {
            "source": int(source[i]),
            "goal": int(goal[i]),
            "confidence": rounded(float(outcome.confidence[i]), 9) if said[i] else 0.0,
            "l2": rounded(float(outcome.distance[i])),
            "reached": bool(outcome.found[i]),
        }
        for i in range(len(goal))
    ]
    return {
        "reached": int(outcome.found.sum()),
        "pairs": len(goal),
        "mean_l2": mean(outcome.distance[outcome.found]),
        "cells": cells,
    }


def _grid(sources: Tensor, best: Tensor, source: Tensor, goal: Tensor) -> Tensor:
    """(k, k, c, h, w) uint8: row = source, column = goal, the sources themselves on the diagonal."""
    k = len(sources)
    grid = sources[:, None].expand(k, k, *sources.shape[1:]).clone()
    grid[source, goal] = best
    return to_bytes(grid)
