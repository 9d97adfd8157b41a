"""What the proofs of a run add up to: derived from its shards, and rebuilt at will."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparring.auditing.distances import STEPS
from sparring.auditing.evidence import as_json
from sparring.auditing.run import Run
from sparring.auditing.standing import BROKEN, CERTIFIED, HELD, Standing

PREFIX = "proof: "  # of the names of stages
SPOT_CHECKS = ("spot_check", "last_spot_check")  # sections: after the cheap proofs, and after the others
COLUMNS = ("proof", "bound", "guard", "proved_in")


def asked(run: Run) -> bool:
    """Was the run to look for proofs?"""
    return bool(run.plan["settings"].get("certify"))


def is_proof(name: str) -> bool:
    """Does a stage of this name look for proofs?"""
    return name.startswith(PREFIX)


def figures(run: Run, standing: Standing) -> dict[str, Any]:
    """Who proved how many rows at what cost, or why there was nobody to."""
    told = run.figures("proofs") or {}
    methods: dict[str, dict[str, Any]] = {}
    for stage in sorted(standing.stages):
        if is_proof(name := standing.stages[stage]):
            part = methods.setdefault(name, {"rows": 0, "certified": 0, "seconds": 0.0})
            part["rows"] += standing.tried[stage]
            part["certified"] += standing.proved[stage]
            part["seconds"] = round(part["seconds"] + standing.seconds[stage], 3)
    return {
        "why_not": told.get("why"),
        "methods": [{"method": name.removeprefix(PREFIX), **part} for name, part in methods.items()],
        "spot_checked": sum((run.figures(name) or {}).get("rows", 0) for name in SPOT_CHECKS),
        "curve": curve(proved_at(standing, run.plan["eps"]), run.plan["rows"]["test"]),
        "bought": bought(standing, run.plan["rows"]["test"]),
    }


def bought(standing: Standing, rows: int) -> dict[str, list[float]]:
    """What time bought: after so many seconds of work, the share of `rows` proved and the share not broken.

    Only where one of the two changes; a long one is thinned.
    """
    told, last = [], (0, 0)
    for seconds, proved, lost in standing.bought:
        if (proved, lost) != last:
            told.append((round(seconds, 3), proved / rows, 1 - lost / rows))
            last = (proved, lost)
    told += [(round(seconds, 3), *told[-1][1:]) for seconds, *_ in standing.bought[-1:] if told]
    if len(told) > STEPS:
        told = [told[round(place * (len(told) - 1) / (STEPS - 1))] for place in range(STEPS)]
    return {name: [one[place] for one in told] for place, name in enumerate(("seconds", "certified", "not_broken"))}


def proved_at(standing: Standing, eps: float) -> Tensor:
    """(n,) float64 the largest radius at which each row is known to be robust; 0 where right alone, -1 where not."""
    right = (standing.state == HELD) | (standing.state == CERTIFIED) | (standing.state == BROKEN)
    known = (standing.state == CERTIFIED).double() * eps
    return torch.maximum(known, standing.radius.nan_to_num(0.0)).masked_fill(~right, -1.0)


def curve(known: Tensor, rows: int) -> dict[str, list[float]]:
    """Where the share of rows that are proved changes: at each eps, and from there back to the one before.

    A long one is thinned: a step then takes place before the first of several does, so it stays a lower bound.
    """
    at, count = torch.unique(known[known >= 0], return_counts=True)
    share = (count.flip(0).cumsum(0).flip(0).double() / rows).tolist()
    steps = at.tolist()
    if not steps or steps[0] > 0:
        steps, share = [0.0, *steps], [share[0] if share else 0.0, *share]
    keep = list(range(len(steps)))
    if len(steps) > STEPS:
        keep = sorted({round(place * (len(steps) - 1) / (STEPS - 1)) for place in range(STEPS)})
    return {"eps": [steps[place] for place in keep], "certified": [share[place] for place in keep]}


def cells(standing: Standing, place: int) -> list[object]:
    """A row's cells of `COLUMNS`: method and shard of its proof, and the best bound found where none proves it."""
    number = int(standing.proof[place])
    known = bool(standing.bound[place] > -torch.inf)
    proof = standing.stages[int(standing.stage[place])].removeprefix(PREFIX) if number >= 0 else ""
    said = [as_json(standing.bound[place]), as_json(standing.guard[place])] if known else ["", ""]
    return [proof, *said, f"evidence/rows/{standing.names[number]}.json" if number >= 0 else ""]
