"""One patch that fools a model on as many images as it can, wherever it lies on them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparring.core import noise
from sparring.core.errors import UsageError, unknown
from sparring.core.model import Access
from sparring.core.patch import Patch
from sparring.core.threat import Threat
from sparring.fitted.ascent import Ascent, Progress, Pull, climb
from sparring.fitted.fooling import Fooling, judge
from sparring.fitted.paste import Paste
from sparring.fitted.untouched import Given, look
from sparring.models.wrap import wrap

LEVELS = {"low": 0.0, "grey": 0.5, "high": 1.0}
CONTROLS = ("noise", *LEVELS)


@dataclass(frozen=True)
class AdversarialPatch:
    """A patch (Brown et al. 2017, arXiv 1712.09665, equation 1), and the ways in which it is put on images."""

    patch: Tensor  # (c, size, size)
    how: Paste
    bounds: tuple[float, float] = (0.0, 1.0)
    target: int | None = None
    forward: int = 0  # passes that fitting took
    backward: int = 0

    @property
    def mask(self) -> Tensor:
        """(size, size) bool: the pixels that belong to the patch."""
        return self.how.footprint(self.patch.device)

    def apply(self, x: Tensor, sample: Tensor, *, draw: int = 0, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Images `x` (n, c, h, w) with the patch at places drawn from their ids `sample` (n,), and its masks."""
        key = noise.keys(seed, sample, torch.full_like(sample, draw + 1))
        grid = self.how.grid(key, 0, x.shape[2], x.shape[3])
        points, mask = self.how.paste(self.patch, x, grid)
        return torch.where(mask, points.clamp(*self.bounds), points), mask

    def control(self, kind: str = "noise", seed: int = 0) -> AdversarialPatch:
        """What was not fitted, put on images in the same ways: uniform `noise`, or plain `low`, `grey` or `high`.

        What covers a part of the image fools by that alone; only what a patch does beyond it was learnt.
        """
        low, high = self.bounds
        if kind not in CONTROLS:
            raise unknown("control", kind, CONTROLS)
        key = noise.keys(seed, *torch.zeros(2, 1, dtype=torch.int64, device=self.patch.device))
        share = noise.uniform(key, self.patch.shape)[0] if kind == "noise" else LEVELS[kind]
        return replace(self, patch=torch.zeros_like(self.patch) + low + (high - low) * share, forward=0, backward=0)

    def judge(
        self,
        model: object,
        test: Given,
        *,
        draws: int = 4,
        seed: int = 0,
        confidence: float = 0.0,
        width: int | None = None,
    ) -> Fooling:
        """Which of the images `test` it fools `model` on, each at `draws` places that hang on its id and `seed`.

        With `confidence` the model must give its wrong answer at least that probability.
        """
        if draws < 1:
            raise UsageError(f"expected at least 1 draw, got {draws}")
        queried = wrap(model)
        images = look(queried, test, self.target, Access.DECISION, width)
        channels, height, across = images.x.shape[1:]
        self.how.check(height, across)
        if channels != len(self.patch):
            raise UsageError(f"expected images of {len(self.patch)} channels, got {channels}")

        def apply(at: Tensor, draw: int) -> tuple[Tensor, Threat]:
            points, mask = self.apply(images.x[at], images.sample[at], draw=draw, seed=seed)
            return points, Patch(mask=mask, bounds=queried.bounds)

        return judge(queried, images, apply, draws, confidence)


def fit_patch(
    model: object,
    train: Given,
    how: Paste | int,
    *,
    target: int | None = None,
    width: int | None = None,
    on_progress: Progress | None = None,
    **settings: Any,
) -> AdversarialPatch:
    """Fit a patch on the images of `train`, `Images` or (x (n, c, h, w), y (n,)): `how` is its size, or a `Paste`.

    Brown et al. 2017, equation 1: the expected loss over images, places, turns and sizes, climbed by signed steps
    on one random draw for each image of a batch. With `target` the model is to name that class, else any wrong
    one. `settings` are the fields of `Ascent`: steps, batch, rate, cap, seed. Passes count as in `fit_universal`.
    """
    queried, ascent = wrap(model), Ascent(**settings)
    paste = Paste(how) if isinstance(how, int) else how
    images = look(queried, train, target, Access.GRADIENT, width)
    channels, height, across = images.x.shape[1:]
    paste.check(height, across)
    low, high = queried.bounds

    def render(patch: Tensor, rows: Tensor, step: int) -> tuple[Tensor, Pull]:
        sample = images.sample[rows]
        grid = paste.grid(noise.keys(ascent.seed, sample, torch.zeros_like(sample)), step, height, across)
        with torch.enable_grad():
            leaf = patch.detach().requires_grad_()
            points, mask = paste.paste(leaf, images.x[rows], grid)
        value = points.detach()
        return torch.where(mask, value.clamp(low, high), value), lambda g: torch.autograd.grad(points, leaf, g)[0]

    def move(patch: Tensor, gradient: Tensor, rate: float) -> Tensor:
        return (patch + rate * (high - low) * gradient.sign()).clamp(low, high)

    grey = torch.full((channels, paste.size, paste.size), (low + high) / 2, device=images.x.device)
    fit = climb(queried, images, ascent, grey, render, move, on_progress)
    return AdversarialPatch(fit.value, paste, queried.bounds, target, fit.forward, fit.backward)
