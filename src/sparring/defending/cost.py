"""What an answer costs, as a multiple of the bare net's: all defenses in one run, turn by turn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sparring.defending.workshop import Subject

ROWS = 256
ROUNDS = 11


def inference(bare: nn.Module, subjects: Sequence[Subject], x: Tensor) -> dict[str, float]:
    """Time of an answer over that of the `bare` net on images `x` (n, c, h, w), by slug.

    As deployed, with one draw of what is random: who answers by the mean of n pays n times as much. Each answers the
    same images once a round, and the shortest of its times counts: what else the machine computes only adds to them.
    """
    rows = x[torch.arange(ROWS, device=x.device) % len(x)]
    # A net without a guard costs what the bare one does: all have the same layers.
    guarded = {one.entry.slug: one.deployed for one in subjects if one.guard is not None}
    least = dict.fromkeys(guarded, math.inf)
    base = math.inf
    with torch.no_grad(), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        for _ in range(ROUNDS):
            base = min(base, _seconds(bare, rows))
            least = {name: min(least[name], _seconds(net, rows)) for name, net in guarded.items()}
    return {one.entry.slug: 1.0 for one in subjects} | {
        name: round(seconds / base, 2) for name, seconds in least.items()
    }


def _seconds(net: Callable[[Tensor], object], x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    began = time.perf_counter()
    net(x.clone())
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - began
