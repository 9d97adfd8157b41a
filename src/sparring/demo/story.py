"""The chapters in order."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from sparring.auditing.plan import common
from sparring.auditing.run import Run
from sparring.data.images import Dataset
from sparring.demo import compare, defend, fgsm, fooling, targeted, train
from sparring.demo.stage import Scale, Stage
from sparring.reporting import write_report

LIMITS = [
    "A row that held is undecided: no attack tried here broke it, and no proof was sought.",
    "The attacks saw the first test rows only; the shaded band is what that sample says of all rows (95 %).",
    "The nets and the trainings are small, to fit a demo; longer training does better.",
    "Only Linf robustness was trained for and measured; a net hardened in one norm may fall in another.",
]
CHAPTERS = (
    ("train", train.tell),
    ("fast gradient sign", fgsm.tell),
    ("noise that a network reads", fooling.tell),
    ("one digit seen, another read", targeted.tell),
    ("the attacks compared", compare.tell),
    ("defend", defend.tell),
)


def plan(data: Dataset, scale: Scale, seed: int, device: str, limit: int | None, framework: str) -> dict[str, Any]:
    """What is asked for."""
    return {
        "data": data.name,
        "rows": {"train": len(data.train), "test": len(data.test)},
        "limit": limit,
        "settings": {
            **vars(scale),
            "framework": framework,
            "hardening": "madry, pgd 7 steps",
            "curve": [repr(a) for a in defend.ATTACKS],
        },
        **common(data.test, seed, device),
        "limits": LIMITS,
    }


def tell(stage: Stage) -> tuple[dict[str, Any], Path]:
    """Tell the story; returns every figure, and the report's path."""
    begin = time.perf_counter()
    for number, (title, chapter) in enumerate(CHAPTERS, 1):
        stage.say(f"[{number}/{len(CHAPTERS)}] {title}")
        chapter(stage)
    stage.run.event("end", seconds=round(time.perf_counter() - begin, 1))
    stage.run.write_result()
    return stage.run.result() | {"seconds": round(time.perf_counter() - begin, 1)}, write_report(stage.run)


def open_run(
    out: Path | None, data: Dataset, scale: Scale, seed: int, device: str, limit: int | None, framework: str = "torch"
) -> Run:
    """The run folder for a story."""
    return Run.create(out, "demo", plan(data, scale, seed, device, limit, framework))
