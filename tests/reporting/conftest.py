"""Small runs of every kind, written as a run writes them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparring.auditing.intervals import clopper_pearson
from sparring.auditing.masking import KINDS
from sparring.auditing.run import Run, write_json
from sparring.core.verdict import robust_accuracy
from sparring.reporting import write_report

Figures = dict[str, Any]
Section = tuple[Figures, dict[str, Tensor]]


def _images(*shape: int) -> Tensor:
    """Noise images, the same each time."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def _train(channels: int, classes: int) -> Section:
    figures: Figures = {}
    tensors: dict[str, Tensor] = {}
    for net, accuracy in (("dense", 0.9746), ("conv", 0.9917)):
        log = [{"step": step, "loss": 3136.286377 / step, "accuracy": 0.9 + step / 4000} for step in (100, 200, 300)]
        figures[net] = {
            "parameters": 109386,
            "steps": 300,
            "accuracy": accuracy,
            "loss": 905.1,
            "seconds": 7.2,
            "log": log,
        }
        for side, count in (("right", 12), ("wrong", 3)):
            labels = torch.arange(count) % classes
            tensors[f"{net}_{side}_x"] = _images(count, channels, 8, 8)
            tensors[f"{net}_{side}_y"] = labels
            tensors[f"{net}_{side}_prediction"] = (labels + (side == "wrong")) % classes
            tensors[f"{net}_{side}_confidence"] = torch.full((count,), 0.75)
    return figures, tensors


def _shown(classes: int) -> list[Figures]:
    first = {"label": 0, "prediction": 0, "confidence": 0.9991, "adversarial_prediction": 1 % classes}
    return [{**first, "adversarial_confidence": 0.8812, "distance": 0.25}] * 2


def _fgsm(channels: int, classes: int) -> Section:
    x = _images(2, channels, 8, 8)
    tensors = {"x": x, "adversarial": 255 - x, "sign": (x > 127).to(torch.int8) * 2 - 1}
    return {"eps": 0.3, "net": "conv", "success": 0.934, "rows": 500, "shown": _shown(classes)}, tensors


def _fooling(channels: int, classes: int) -> Section:
    entries = [{"goal": k, "confidence": 0.999981, "steps": 212, "reached": k > 0} for k in range(classes)]
    images = _images(classes, channels, 8, 8)
    figures = {
        "min_confidence": 0.99995,
        "lambda": 0.0,
        "steps": 500,
        "nets": {"dense": entries, "conv": entries},
    }
    return figures, {"dense": images, "conv": images.clone()}


def _targeted(channels: int, classes: int) -> Section:
    pairs = [(source, goal) for source in range(classes) for goal in range(classes) if source != goal]
    classic = [
        {"source": s, "goal": g, "confidence": 0.71 if s == 0 else 0.99993, "l2": 5.0 + g, "reached": s != 0}
        for s, g in pairs
    ]
    improved = [{"source": s, "goal": g, "confidence": 0.99992, "l2": 2.0, "reached": True} for s, g in pairs]
    hit = sum(cell["reached"] for cell in classic)
    figures = {
        "threshold": 0.9999,
        "lambda": 0.5,
        "net": "conv",
        "classic": {
            "reached": hit,
            "pairs": len(pairs),
            "mean_l2": 5.2,
            "mean_l2_all": 5.0,
            "cells": classic,
        },
        "improved": {
            "reached": len(pairs),
            "pairs": len(pairs),
            "mean_l2": 2.31,
            "mean_l2_all": 2.31,
            "cells": improved,
            "method": "ddn",
        },
    }
    grid = _images(classes, classes, channels, 8, 8)
    return figures, {"sources": _images(classes, channels, 8, 8), "classic": grid, "improved": grid.clone()}


def _attacks() -> list[Figures]:
    first = {"name": "fgsm", "success": 0.712, "mean_linf": 0.3, "mean_l2": 5.91, "confidence": 0.913}
    second = {"name": "square", "success": 0.998, "mean_linf": None, "mean_l2": None, "confidence": None}
    return [
        {**first, "forward": 1000, "backward": 500, "seconds": 0.02},
        {**second, "forward": 612000, "backward": 0, "seconds": 31.0},
    ]


def _compare(channels: int, classes: int) -> Section:
    return {"rows": 500, "net": "conv", "threat": "Linf eps 0.3", "attacks": _attacks()}, {}


def _defend(channels: int, classes: int) -> Section:
    soft = {"clean": 0.992, "robust": {"0.1": 0.31, "0.3": 0.002}, "seconds": 30.1}
    hard = {
        "clean": 0.984,
        "robust": {"0.1": 0.967, "0.3": 0.931},
        "training_cost": 8.1,
        "eps": 0.3,
        "seconds": 60,
    }
    hard["interval"] = {"0.3": [0.905, 0.952]}
    models = {"undefended": soft, "madry": hard}
    return {"rows": 500, "norm": "linf", "attack": "apgd", "eps": [0.0, 0.1, 0.3], "models": models}, {}


def _attack(channels: int, classes: int) -> Section:
    x = _images(2, channels, 8, 8)
    figures = {
        "rows": 77,
        "model": "mine.pt",
        "data": "digits",
        "threat": "L2 eps 1.5",
        "attacks": _attacks(),
    }
    figures |= {"shown": _shown(classes), "rule": "the two smallest changes"}
    return figures, {"x": x, "adversarial": (x // 2)}


SECTIONS: dict[str, Callable[[int, int], Section]] = {
    "train": _train,
    "fgsm": _fgsm,
    "fooling": _fooling,
    "targeted": _targeted,
    "compare": _compare,
    "defend": _defend,
    "attack": _attack,
}
PLAN: Figures = {
    "schema": 1,
    "kind": "demo",
    "data": "mnist",
    "data_digest": "c0ffee",
    "rows": {"train": 60000, "test": 10000},
    "seed": 41,
    "device": "cpu",
    "settings": {"fooling": {"inner_steps": 512}, "note": "by hand"},
    "versions": {"sparring": "0.1.0", "torch": "2.13.0"},
    "hardware": {"processor": "abacus", "cores": 2},
    "limits": ["Only 500 rows were attacked."],
}

Make = Callable[..., Run]


@pytest.fixture
def section() -> Callable[..., Section]:
    """The figures and tensors of one section."""
    return lambda name: SECTIONS[name](1, 3)


def build(path: Path, *names: str, channels: int = 1, size: int = 3, **plan: object) -> Run:
    """A run at `path` with the named sections, or with all."""
    held = {"classes": [f"class {k}" for k in range(size)]}
    write_json(path / "plan.json", PLAN | held | plan)
    run = Run(path)
    for name in names or SECTIONS:
        figures, tensors = SECTIONS[name](channels, size)
        run.record(name, figures, tensors)
    return run


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A function from names of sections to a run that has them."""
    return partial(build, tmp_path)


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of a run that has every section."""
    return write_report(build(tmp_path_factory.mktemp("full"))).read_text()


def audit_plan(classes: int, rows: int) -> Figures:
    return {
        "schema": 1,
        "kind": "audit",
        "model": "mine.pt",
        "data": "mnist",
        "rows": {"test": rows},
        "settings": {"threat": "Linf(eps=0.3, bounds=(-1.0, 1.0))", "eight_bit": False, "access": "GRADIENT"},
        "threat": "linf eps 0.3",
        "norm": "linf",
        "eps": 0.3,
        "profile": "standard",
        "classes": [f"class {label}" for label in range(classes)],
        "seed": 3,
        "device": "cpu",
    }


def audit_stage(number: int, name: str, rows: int, broken: int, forward: int, backward: int) -> Figures:
    cost = {"forward": forward, "backward": backward, "seconds": 0.25}
    return {"stage": number, "name": name, "rows": rows, "broken": broken, **cost}


def audit_figures(classes: int = 10, counts: Figures | None = None, **other: object) -> Figures:
    """The section `audit`, of 400 rows; what is counted agrees with itself."""
    standard = {"misclassified": 12, "broken": 190, "certified": 0, "undecided": 198, "error": 0}
    counts = counts or standard
    rows = sum(counts.values())
    lower, upper = robust_accuracy(counts)
    low, high = clopper_pearson(round(lower * rows), rows)[0], clopper_pearson(round(upper * rows), rows)[1]
    right, broken = rows - counts["misclassified"] - counts["error"], counts["broken"]
    first = broken - broken // 10
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    for row in range(broken):
        confusion[row % classes, (row % classes + 1 + row % (classes - 1)) % classes] += 1
    per = [
        {
            "class": f"class {label}",
            "rows": 40,
            "clean": 0.975,
            "certified": 0.0,
            "upper": (8 + label % 20) / 40,
            "interval": list(clopper_pearson(8 + label % 20, 40)),
        }
        for label in range(classes)
    ]
    stages = [audit_stage(0, "clean images", rows, 0, rows, 0)]
    if right:
        stages += [audit_stage(1, "sprint", right, first, 9 * right, 8 * right)]
        stages += [audit_stage(2, "round of 1", right - first, broken - first, 5123, 1234)]
    return {
        "rows": rows,
        "clean_accuracy": right / rows,
        "robust_accuracy": {"lower": lower, "upper": upper},
        "population": {"lower": low, "upper": high, "level": 0.95},
        "counts": counts,
        "forward_passes": sum(one["forward"] for one in stages),
        "backward_passes": sum(one["backward"] for one in stages),
        "seconds": 12.345,
        "also_spent": {"checklist": {"forward": 14008, "backward": 7225, "seconds": 0.84}},
        "complete": True,
        "warnings": [],
        "moved": 0,
        "survive_as_8_bit": 0.8 if broken else None,
        "stages": stages,
        "classes": per,
        "confusion": confusion.tolist(),
        "errors": {},
        "confidence": {"before": [0] * 9 + [broken], "after": [0] * 5 + [broken] + [0] * 4},
    } | other


def audit_curve() -> Figures:
    sprint, square = [0.97, 0.9, 0.4375, 0.0], [0.97, 0.95, 0.75, 0.125]
    drawn = {"curves": {"sprint": sprint, "square": square}, "worst": sprint}
    return {"eps": [0.0, 0.15, 0.3, 0.6], **drawn, "rows": 64, "forward": 1, "backward": 1, "seconds": 1.5}


def audit_checklist(raised: str = "more_steps_still_help", unknown: str = "loss_still_climbing") -> Figures:
    signs = [
        {
            "name": name,
            "raised": name == raised,
            "measure": None if name == unknown else 0.5 if name == raised else 0.0,
            "threshold": threshold,
            "finding": f"Not measured: {name} is unknown." if name == unknown else f"Found of {name}.",
            "advice": advice,
        }
        for name, (threshold, advice) in KINDS.items()
    ]
    return {"signs": signs, "rows": 64, "seconds": 0.8, "forward": 14008, "backward": 7225}


def audit_gallery(run: Run, channels: int = 1, count: int = 3) -> None:
    x = torch.rand(count, channels, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    fact = {"label": 1, "prediction": 1, "confidence": 0.9991, "adversarial_prediction": 0}
    fact |= {"adversarial_confidence": 0.4321, "distance": 0.3, "decided_by": "round of 4", "eight_bit": True}
    shown = [fact | {"id": 17 + place, "eight_bit": place == 0} for place in range(count)]
    held = {"x": x, "adversarial": (x + 0.3).clamp(-1, 1)}
    run.record("gallery", {"rule": "the three of the smallest ids", "shown": shown}, held)


def audit_build(path: Path, figures: Figures, *, classes: int = 10, full: bool = True) -> Run:
    write_json(path / "plan.json", audit_plan(classes, figures["rows"]))
    run = Run(path)
    run.record("audit", figures)
    if full:
        run.record("curve", audit_curve())
        run.record("checklist", audit_checklist())
        audit_gallery(run)
    return run


@pytest.fixture
def hand() -> SimpleNamespace:
    """What an audit by hand is made of."""
    return SimpleNamespace(
        plan=audit_plan,
        stage=audit_stage,
        audit=audit_figures,
        curve=audit_curve,
        checklist=audit_checklist,
        gallery=audit_gallery,
        build=audit_build,
    )
