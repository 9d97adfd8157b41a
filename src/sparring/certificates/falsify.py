"""Points that break a question, sought by projected gradient descent: Madry et al. 2018, arXiv:1706.06083."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from sparring.certificates.branch import Confirm, Question
from sparring.certificates.graph import Graph
from sparring.certificates.region import Region
from sparring.core import noise

_AT_ONCE = 2**21  # numbers in the widest node
_FIRST, _LAST = 0.25, 0.005  # steps, in widths of the box


def falsify(
    graph: Graph,
    region: Region,
    question: Question,
    *,
    starts: int,
    steps: int,
    deadline: float | None,
    confirm: Confirm,
    seed: int = 0,
) -> None:
    """Descend the largest of each row's constraints from `starts` random points of its box in the type of `graph`.

    Whatever meets all of them is put to `confirm`, which may end the search by an exception.
    """
    rows = torch.arange(len(question.offset)).repeat_interleave(starts)
    for some in torch.split(rows, max(starts, _AT_ONCE // graph.widest)):
        key = noise.keys(seed, some, torch.arange(len(some)) % starts)
        _descend(graph, region.take(some), question.take(some), some, key, steps, deadline, confirm)


def _descend(
    graph: Graph,
    region: Region,
    question: Question,
    row: Tensor,
    key: Tensor,
    steps: int,
    deadline: float | None,
    confirm: Confirm,
) -> None:
    low, high = region.low.float(), region.high.float()
    asked, offset = question.asked.float(), question.offset.float()
    x = low + (high - low) * noise.uniform(key, low.shape[1:])
    for step in range(steps + 1):
        if deadline is not None and time.monotonic() > deadline:
            return
        with torch.enable_grad():
            leaf = x.requires_grad_()
            worst = (torch.einsum("nso,no->ns", asked, graph.forward(leaf)) + offset).amax(1)
            (gradient,) = torch.autograd.grad(worst.sum(), leaf)
        hit = (worst <= 0).nonzero().squeeze(1)
        if len(hit):
            hit = hit[worst[hit].argsort()[:4]]
            confirm(x.detach()[hit].double(), row[hit])
        rate = _FIRST * (_LAST / _FIRST) ** (step / max(1, steps))
        x = torch.clamp(x.detach() - rate * (high - low) * gradient.sign(), low, high)
