"""Images as the model sees them before anything is done to them: what there is to fool."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.core.batch import Batch
from sparring.core.errors import AttackError, DataError, UsageError
from sparring.core.judge import Judge
from sparring.core.model import Access, Model
from sparring.core.threat import Unbounded
from sparring.data.images import Images
from sparring.engine import preflight
from sparring.engine import width as widths
from sparring.engine.replay import replay

Given = Images | tuple[Tensor, Tensor]  # or images (n, c, h, w) with labels (n,)


@dataclass(frozen=True)
class Untouched:
    """Labelled images, and what the model says of them; one query each."""

    x: Tensor  # (n, c, h, w)
    y: Tensor  # (n,) int64
    sample: Tensor  # (n,) int64 ids
    goal: Tensor  # (n,) int64: the class to reach, or -1 for any wrong one
    label: Tensor  # (n,) int64, -1 where the model failed
    confidence: Tensor  # (n,) float64
    failed: Tensor  # (n,) bool: the model has no answer
    held: Tensor  # (n,) bool: it is right, and that is not the class to reach
    width: int  # rows a model call


def look(model: Model, given: Given, target: int | None, needs: Access, width: int | None) -> Untouched:
    """Ask `model` about the images as they are; refuses what does not fit it, and images with nothing to fool."""
    x, y = (given.x, given.y) if isinstance(given, Images) else given
    sample = given.ids if isinstance(given, Images) else torch.arange(len(x), device=x.device)
    if width is not None and width < 1:
        raise UsageError(f"expected a width of at least 1, got {width}")
    preflight.check_images(x, model.bounds)
    if model.access < needs:
        raise AttackError(
            f"fitting needs {needs.name} access, the model gives {model.access.name}; fit on a model of your own "
            f"and judge on this one"
        )
    classes = preflight.check_model(model, x, min(needs, model.access))
    preflight.check_labels(y, len(x), classes=classes)
    if target is not None and (target < 0 or (classes is not None and target >= classes)):
        top = "" if classes is None else f" to {classes - 1}"
        raise UsageError(f"expected a target from 0{top}, got {target}")
    goal = torch.full_like(y, -1 if target is None else target)
    width = width or widths.automatic(x[0])
    said = replay(model, Judge(), Batch(x, y, goal, sample, Unbounded(model.bounds)), x, width)
    failed = said.label < 0
    held = (said.label == y) & (y != goal)
    if not held.any():
        other = "" if target is None else f" and that are not of class {target}"
        raise DataError(f"expected images that the model gets right{other}, got none among {len(x)}; nothing to fool")
    return Untouched(x, y, sample, goal, said.label, said.score, failed, held, width)
