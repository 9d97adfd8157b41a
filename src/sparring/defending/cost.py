"""What an answer costs, as a multiple of the bare net's: all defenses in one run, turn by turn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sparring.defending.workshop import Subject
from sparring.models.eot import apart

ROWS = 256
ROUNDS = 11


def inference(bare: nn.Module, subjects: Sequence[Subject], x: Tensor, draws: int) -> dict[str, float]:
    """Time of an answer over that of the `bare` net on images `x` (n, c, h, w), by slug.

    As judged: what is random answers by so many `draws` together, and pays for all of them. Each answers the same
    images once a round, and the shortest of its times counts: what else the machine computes only adds to them.
    """
    rows = x[torch.arange(ROWS, device=x.device) % len(x)]
    # A net without a guard costs what the bare one does: all have the same layers.
    guarded = {one.entry.slug: one.deployed for one in subjects if one.guard is not None}
    least = dict.fromkeys(guarded, math.inf)
    base = math.inf
    with torch.no_grad(), apart(x.device):
        for _ in range(ROUNDS):
            base = min(base, _seconds(bare, rows))
            least = {name: min(least[name], _seconds(net, rows)) for name, net in guarded.items()}
    asked = {one.entry.slug: draws for one in subjects if one.guard is not None and one.guard.randomised}
    return {one.entry.slug: 1.0 for one in subjects} | {
        name: round(asked.get(name, 1) * seconds / base, 2) for name, seconds in least.items()
    }


def _seconds(net: Callable[[Tensor], object], x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    began = time.perf_counter()
    net(x.clone())
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - began
