"""Some of the images that broke a model, with the clean ones beside them."""

from __future__ import annotations

from typing import Any

import torch

from sparring.auditing.evidence import Evidence, as_json
from sparring.auditing.run import Run
from sparring.auditing.standing import BROKEN, Standing
from sparring.data.images import Images

SHOWN = 12
RULE = f"up to {SHOWN} of the broken rows, evenly spaced by row number"


def hang(run: Run, standing: Standing, images: Images) -> None:
    """Record the section `gallery`; nothing when no row is broken."""
    broken = (standing.state == BROKEN).nonzero().squeeze(1)
    broken = broken[standing.ids[broken].argsort()]
    if not len(broken):
        return
    places = broken[torch.linspace(0, len(broken) - 1, min(SHOWN, len(broken))).long()]
    evidence, found = Evidence(run), []
    for place in places.tolist():
        stored = evidence.images(standing.names[int(standing.shard[place])])
        found.append(stored["exact"][int(standing.image[place])])
    shown = [_told(standing, place) for place in places.tolist()]
    run.record("gallery", {"rule": RULE, "shown": shown}, {"x": images.x[places], "adversarial": torch.stack(found)})


def _told(standing: Standing, place: int) -> dict[str, Any]:
    return {
        "id": int(standing.ids[place]),
        "label": int(standing.y[place]),
        "prediction": int(standing.clean_label[place]),
        "confidence": as_json(standing.clean_confidence[place]),
        "adversarial_prediction": int(standing.label[place]),
        "adversarial_confidence": as_json(standing.confidence[place]),
        "distance": as_json(standing.distance[place]),
        "decided_by": standing.stages[int(standing.stage[place])],
        "eight_bit": bool(standing.eight_bit[place]),
    }
