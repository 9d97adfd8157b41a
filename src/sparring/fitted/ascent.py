"""Stochastic ascent of one tensor that many images share.

Shafahi et al. 2020, "Universal adversarial training" (arXiv 1811.11304), Algorithm 2: a small batch of images a
step, the mean gradient of their losses, a step of a size that does not depend on the gradient's, a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.core import losses, noise
from sparring.core.attack import Observation
from sparring.core.batch import Batch
from sparring.core.errors import ModelError, UsageError
from sparring.core.model import Access, Model, passes
from sparring.core.threat import Unbounded
from sparring.engine.asking import ask
from sparring.engine.process import shared_cores
from sparring.fitted.untouched import Untouched

Pull = Callable[[Tensor], Tensor]  # gradients (n, c, h, w) at the points -> the gradient of the shared tensor
Render = Callable[[Tensor, Tensor, int], tuple[Tensor, Pull]]  # (shared, rows, step) -> the points, and the way back
Move = Callable[[Tensor, Tensor, float], Tensor]  # (shared, gradient, rate) -> the next
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Ascent:
    """How to fit: `steps` of `batch` images each, the first as long as `rate` times the reach, the last near 0.

    `cap` is the most that the margin of one image counts for, in logits, so that those already fooled leave room for
    the others. The paper clips the cross-entropy to that end; but that is near 0, with a slope near 0, just where an
    image holds well, and on a net for MNIST it fooled 42 % where the margin fools 78 %. All that is random comes
    from `seed`.
    """

    steps: int = 300
    batch: int = 100
    rate: float = 0.1
    cap: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what can fit nothing."""
        if self.steps < 1 or self.batch < 1:
            raise UsageError(f"expected steps and batch of at least 1, got {self.steps} and {self.batch}")
        if not (self.rate > 0 and self.cap > 0):
            raise UsageError(f"expected a rate and a cap above 0, got {self.rate} and {self.cap}")

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """(n,) margins by which rows are fooled, at most `cap`."""
        return losses.margin(logits, batch).clamp_max(self.cap)

    def batches(self, sample: Tensor) -> Iterator[Tensor]:
        """Places (batch,) among rows with ids `sample` (n,), a batch a step, in another order every epoch."""
        size = min(self.batch, len(sample))
        for step in range(self.steps):
            epoch, place = divmod(step, len(sample) // size)
            if place == 0:
                key = noise.keys(self.seed, sample, torch.full_like(sample, epoch))
                order = noise.bits(key, (1,)).squeeze(1).argsort(stable=True)
            yield order[place * size : (place + 1) * size]


@dataclass(frozen=True)
class Fit:
    """What an ascent ended with, and the passes it took."""

    value: Tensor
    forward: int
    backward: int


def climb(
    model: Model,
    images: Untouched,
    how: Ascent,
    start: Tensor,
    render: Render,
    move: Move,
    on_progress: Progress | None = None,
) -> Fit:
    """Climb from `start` on the rows that hold; `ModelError` when the model answers for none of a batch."""
    value, spent = start, 0
    rows = images.held.nonzero().squeeze(1)
    with shared_cores():
        for step, place in enumerate(how.batches(images.sample[rows])):
            at = rows[place]
            points, pull = render(value, at, step)
            answer = ask(model, points, Access.GRADIENT)
            if len(answer.failed) == len(points):
                raise ModelError(answer.failed[0])
            batch = Batch(points, images.y[at], images.goal[at], images.sample[at], Unbounded(model.bounds))
            seen = Observation(batch, answer.prediction, torch.zeros_like(batch.targeted), Access.GRADIENT)
            _, gradient = seen.value_and_grad(how.loss)
            value = move(value, pull(gradient), how.rate * (1 - step / how.steps))
            spent += len(points)
            if on_progress:
                on_progress(step + 1, how.steps)
    each = passes(model)
    return Fit(value, (len(images.y) + spent) * each, spent * each)
