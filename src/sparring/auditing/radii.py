"""The largest radius at which each row is proved, by bisection: every radius that is told has its proof."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor

from sparring.auditing.evidence import Shard
from sparring.auditing.proving import Prover
from sparring.auditing.standing import CERTIFIED, HELD, STATES
from sparring.certificates.graph import OutOfTime

NAME = "radius: "
HALVINGS = 5  # of the interval between a radius that is proved and one that is not
_CHUNK = 32  # rows at once


def widen(prover: Prover, method: str) -> bool:
    """Look for the radius of every row that is right, as a stage of its own; False when time ran out."""
    search, standing = prover.search, prover.search.standing
    right = ((standing.state == HELD) | (standing.state == CERTIFIED)).nonzero().squeeze(1)
    right = right[standing.ids[right].argsort()]
    prover.number += 1
    search.take_up(prover.number)
    for place, at in enumerate(torch.split(right, _CHUNK)):
        search.tell("radius", place * _CHUNK, len(right))
        if (standing.weighed[at] == prover.number).all():
            continue
        search.began = time.monotonic()
        try:
            radius = largest(prover, method, at)
        except OutOfTime:
            return False
        nothing = [0] * len(at)
        search.commit(
            Shard(
                stage=prover.number,
                name=NAME + method,
                ids=search.images.ids[at].tolist(),
                state=[STATES[code] for code in standing.state[at].tolist()],
                gap=[],
                forward=nothing,
                backward=nothing,
                radius=radius.tolist(),
            )
        )
    return True


def largest(prover: Prover, method: str, at: Tensor) -> Tensor:
    """(m,) float64 radii at which the rows `at` (m,) are proved; 0 where not even the least one tried is.

    From the eps asked for, a radius that is proved doubles as far as images reach; then the interval is halved.
    """
    threat, images = prover.search.setting.threat, prover.search.images.x
    most = threat.farthest(images[:1])
    low = (prover.search.standing.state[at] == CERTIFIED).double() * threat.eps
    high = torch.full_like(low, threat.eps)

    def holds(rows: Tensor, radius: Tensor) -> Tensor:
        held = torch.zeros_like(rows, dtype=torch.bool)
        for eps in torch.unique(radius).tolist():  # rows that ask for the same radius go together
            mine = radius == eps
            held[mine] = prover.prove(method, at[rows[mine]], replace(threat, eps=eps)).certified
        return held

    growing = (low > 0).nonzero().squeeze(1)
    while len(growing):
        high[growing] = (2 * low[growing]).clamp_max(most)
        held = holds(growing, high[growing])
        low[growing[held]] = high[growing[held]]
        growing = growing[held]
        growing = growing[low[growing] < most]
    for _ in range(HALVINGS):
        open_ = (low < high).nonzero().squeeze(1)
        if not len(open_):
            break
        middle = (low[open_] + high[open_]) / 2
        held = holds(open_, middle)
        low[open_[held]], high[open_[~held]] = middle[held], middle[~held]
    return low
