"""What the verdicts add up to: derived from the shards, and rebuilt at will."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import torch

from sparring.auditing import proofs
from sparring.auditing.distances import spread
from sparring.auditing.evidence import Evidence, as_json
from sparring.auditing.intervals import clopper_pearson
from sparring.auditing.run import Run, writing
from sparring.auditing.standing import BROKEN, Standing
from sparring.core.files import write_atomic
from sparring.core.verdict import Verdict, robust_accuracy

LEVEL = 0.95
COLUMNS = (
    "id", "label", "verdict", "decided_by", "clean_label", "adversarial_label", "clean_confidence",
    "adversarial_confidence", "distance", "margin", "forward", "backward", "eight_bit", "image", "reason",
)  # fmt: skip


def summarise(run: Run) -> dict[str, Any]:
    """Every figure of an audit that follows from its shards."""
    standing, plan = Standing.of(Evidence(run)), run.plan
    rows = plan["rows"]["test"]
    counts = standing.counts
    counts[Verdict.UNDECIDED] += rows - len(standing.ids)  # not even looked at
    lower, upper = robust_accuracy(counts)
    ends = None
    if lower is not None and upper is not None:
        low, high = clopper_pearson(round(lower * rows), rows)[0], clopper_pearson(round(upper * rows), rows)[1]
        ends = {"lower": low, "upper": high, "level": LEVEL}
    checks, curve = run.figures("checklist") or {}, run.figures("curve") or {}
    beside = {name.replace("_", " "): run.figures(name) or {} for name in proofs.SPOT_CHECKS}
    beside |= {"checklist": checks, "curve": curve}
    signs = checks.get("signs", [])
    return {
        "rows": rows,
        "clean_accuracy": _share(standing.clean_label == standing.y),
        "robust_accuracy": {"lower": lower, "upper": upper},
        "population": ends,
        "counts": counts,
        "forward_passes": int(standing.forward.sum()),
        "backward_passes": int(standing.backward.sum()),
        "seconds": round(sum(standing.seconds.values()), 3),
        "also_spent": {
            name: {key: part[key] for key in ("forward", "backward", "seconds")}
            for name, part in beside.items()
            if part.get("forward") is not None
        },
        "complete": (run.path / "evidence" / "finished.json").is_file(),
        "warnings": [f"{sign['name']}: {sign['finding']}; {sign['advice']}" for sign in signs if sign["raised"]],
        "moved": int(standing.moved.sum()),
        "survive_as_8_bit": _share(standing.eight_bit[standing.state == BROKEN]),
        "stages": _stages(standing),
        "classes": _classes(standing, plan["classes"]),
        "confusion": _confusion(standing, len(plan["classes"])),
        "errors": _errors(standing),
        "confidence": _confidence(standing),
        **({"distances": spread(standing, rows, plan["eps"])} if measured(run) else {}),
        **({"proofs": proofs.figures(run, standing)} if proofs.asked(run) else {}),
    }


def measured(run: Run) -> bool:
    """Was the run to look for the smallest distances?"""
    return bool(run.plan["settings"].get("distances"))


def _share(values: torch.Tensor) -> float | None:
    return values.double().mean().item() if len(values) else None


def _stages(standing: Standing) -> list[dict[str, Any]]:
    """What every stage tried, decided and cost."""
    return [
        {
            "stage": stage,
            "name": standing.stages[stage],
            "rows": standing.tried[stage],
            "broken": standing.fell[stage],
            **({"certified": standing.proved[stage]} if proofs.is_proof(standing.stages[stage]) else {}),
            "forward": standing.costs[stage, "forward"],
            "backward": standing.costs[stage, "backward"],
            "seconds": round(standing.seconds[stage], 3),
        }
        for stage in sorted(standing.stages)
    ]


def _classes(standing: Standing, names: list[str]) -> list[dict[str, Any]]:
    """Per true class: rows, those right when untouched, and those not broken, with an interval."""
    verdicts = standing.verdicts
    found = []
    for label, name in enumerate(names):
        mine = [v for v, y in zip(verdicts, standing.y.tolist(), strict=True) if y == label]
        if not mine:
            continue
        held = len(mine) - mine.count(Verdict.MISCLASSIFIED) - mine.count(Verdict.BROKEN)
        low, high = clopper_pearson(held, len(mine))
        found.append(
            {
                "class": name,
                "rows": len(mine),
                "clean": _share(standing.clean_label[standing.y == label] == label),
                "certified": mine.count(Verdict.CERTIFIED) / len(mine),
                "upper": held / len(mine),
                "interval": [low, high],
            }
        )
    return found


def _confusion(standing: Standing, classes: int) -> list[list[int]] | None:
    """[true class][class named] counts of the broken rows; None when there are too many classes to show."""
    if classes > 50:
        return None
    table = torch.zeros(classes, classes, dtype=torch.int64)
    for row in (standing.state == BROKEN).nonzero().squeeze(1).tolist():
        table[standing.y[row], standing.label[row].clamp(0, classes - 1)] += 1
    counts: list[list[int]] = table.tolist()
    return counts


def _errors(standing: Standing) -> dict[str, str]:
    """The first few failures, by row id."""
    ids = standing.ids.tolist()
    return {str(ids[place]): standing.reasons[place] for place in sorted(standing.reasons)[:10]}


def _confidence(standing: Standing) -> dict[str, list[int]]:
    """Broken rows by the confidence of the model, in tenths, before and after."""
    broken = standing.state == BROKEN
    return {
        name: torch.histc(values[broken].nan_to_num(0.0).float(), 10, 0.0, 1.0).long().tolist()
        for name, values in (("before", standing.clean_confidence), ("after", standing.confidence))
    }


def row_ids(run: Run) -> list[int]:
    """The ids of all rows of the plan."""
    ids: list[int] | None = run.plan.get("ids")
    return list(range(run.plan["rows"]["test"])) if ids is None else ids


def _nearest(standing: Standing, place: int) -> str:
    """Where the image of a row's smallest distance is stored."""
    number = int(standing.near[place])
    if number < 0:
        return ""
    return f"evidence/rows/{standing.names[number]}.safetensors#exact[{int(standing.near_image[place])}]"


def write_rows(run: Run) -> Path:
    """Rebuild `rows.csv`: a line for every row.

    `image` is what decided the verdict, and `distance` its distance; where smallest distances were looked for,
    `distance` is that, and `nearest` the image that shows it.
    """
    standing = Standing.of(Evidence(run))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    near, proving = measured(run), proofs.asked(run)
    head = (*COLUMNS, *(("nearest",) if near else ()), *(proofs.COLUMNS if proving else ()))
    writer.writerow(head)
    for place, verdict in enumerate(standing.verdicts):
        broken = verdict is Verdict.BROKEN
        shard = standing.names[int(standing.shard[place])] if standing.shard[place] >= 0 else ""
        image = f"evidence/rows/{shard}.safetensors#exact[{int(standing.image[place])}]" if broken else ""
        stage = int(standing.stage[place])
        decided = standing.stages[stage] if verdict is not Verdict.UNDECIDED and stage >= 0 else ""
        distance = as_json(standing.distance[place]) if broken else ""
        if near:
            distance = as_json(standing.reach[place]) if standing.reach[place] < torch.inf else ""
        after = [int(standing.label[place]), as_json(standing.confidence[place])] if broken else ["", ""]
        writer.writerow(
            [
                int(standing.ids[place]), int(standing.y[place]), str(verdict), decided,
                int(standing.clean_label[place]), after[0], as_json(standing.clean_confidence[place]), after[1],
                distance, f"{float(standing.gap[place]):.7g}",
                int(standing.forward[place]), int(standing.backward[place]),
                int(standing.eight_bit[place]) if broken else "", image, standing.reasons.get(place, ""),
                *([_nearest(standing, place)] if near else []),
                *(proofs.cells(standing, place) if proving else []),
            ]
        )  # fmt: skip
    for unseen in sorted(set(row_ids(run)) - set(standing.ids.tolist())):
        writer.writerow([unseen, "", str(Verdict.UNDECIDED)] + [""] * (len(head) - 3))
    with writing(run.path):
        write_atomic(run.path / "rows.csv", text.getvalue().encode())
    return run.path / "rows.csv"
