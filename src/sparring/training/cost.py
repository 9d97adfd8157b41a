"""What a step of a recipe costs: its time over that of a plain step beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

SAMPLES = 20  # steps of a training that are timed


def timed(step: int, steps: int) -> bool:
    """Is this step of so many among those that are timed: the middle one of each of `SAMPLES` equal parts?"""
    part = max(1, steps // SAMPLES)
    return step % part == part // 2


def seconds(work: Callable[[], None], device: str) -> float:
    """How long `work` takes on `device`."""
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def multiple(ratios: Sequence[float]) -> float | None:
    """The mean of the ratios measured but for the least and the largest of three or more; None of none.

    A mean, since some steps of a recipe may cost more than others; a pause of the machine makes one the largest.
    """
    kept = sorted(ratios)[1:-1] if len(ratios) > 2 else ratios
    return round(fmean(kept), 2) if kept else None


class PlainStep:
    """A step of plain training on weights of its own, so that the net, whose forward pass it uses, stays as it is."""

    def __init__(self, net: nn.Module) -> None:
        self._net = net
        self._weights = {name: w.detach().clone().requires_grad_() for name, w in net.named_parameters()}
        self._buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
        self._optimiser = torch.optim.Adam(self._weights.values(), lr=0.0)  # only its time counts

    def take(self, x: Tensor, y: Tensor) -> None:
        """Forward, backward and an update on images `x` (n, c, h, w) with labels `y` (n,)."""
        self._optimiser.zero_grad()
        logits = functional_call(self._net, {**self._weights, **self._buffers}, (x,))
        cross_entropy(logits, y).backward()  # type: ignore[no-untyped-call]  # torch
        self._optimiser.step()
