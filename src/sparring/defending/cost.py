"""What an answer costs, as a multiple of the bare net's: all defenses in one run, turn by turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor, nn

from sparring.defending.workshop import Subject

ROWS = 256
ROUNDS = 11


def inference(bare: nn.Module, subjects: Sequence[Subject], x: Tensor) -> dict[str, float]:
    """Time of an answer over that of the `bare` net on images `x` (n, c, h, w), by slug: the median of ratios.

    As deployed, with one draw of what is random: who answers by the mean of n pays n times as much. In each round
    all answer the same images one after the other, so that what slows one slows the others.
    """
    rows = x[torch.arange(ROWS, device=x.device) % len(x)]
    # A net without a guard costs what the bare one does: all have the same layers.
    guarded = {one.entry.slug: one.deployed for one in subjects if one.guard is not None}
    ratios: dict[str, list[float]] = {name: [] for name in guarded}
    with torch.no_grad(), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        for turn in range(ROUNDS + 1):
            base = min(_seconds(bare, rows), _seconds(bare, rows))
            for name, net in guarded.items():
                taken = _seconds(net, rows)
                if turn:  # the first is for warming up
                    ratios[name].append(taken / base)
    return {one.entry.slug: 1.0 for one in subjects} | {
        name: round(median(found), 2) for name, found in ratios.items()
    }


def _seconds(net: Callable[[Tensor], object], x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    began = time.perf_counter()
    net(x.clone())
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - began
