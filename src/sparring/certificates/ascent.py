"""The climb of alpha-CROWN: lower slopes of ReLUs are moved, within [0, 1], to where a bound is highest.

Xu et al. 2021, arXiv:2011.13824, section 3.1: every slope in [0, 1] of an unstable ReLU gives a sound bound, so the
best one is sought by Adam, for each question by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparring.certificates.relaxation import Lines

Slopes = Mapping[int, Tensor]  # of the ReLUs by their places; (n, s, *shape)
Fit = Callable[[int, Tensor], Tensor]
Enough = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Ascent:
    """How long and how fast to climb: Adam, its rate falling by `decay` each step.

    `deep` steps go to each bound of the argument of an activation, in the order of the layers, before the margins.
    """

    steps: int = 20
    rate: float = 0.25
    decay: float = 0.95
    deep: int = 10


def movable(line: Lines) -> Tensor | None:
    """Where the lower slope of an activation may be moved: at unstable ReLUs; None if there are none."""
    if line.low_shift is not None or line.high_slope is None:
        return None
    split = (line.high_slope > 0) & (line.high_slope < 1)
    return split if bool(split.any()) else None


def moved(line: Lines, split: Tensor, slope: Tensor) -> Lines:
    """`line` with lower slope `slope` (n, s, *shape) where `split`, (n, *shape) or (n, s, *shape)."""
    assert line.low_slope is not None
    split, low = (t.unsqueeze(1) if t.dim() < slope.dim() else t for t in (split, line.low_slope))
    return replace(line, low_slope=torch.where(split, slope, low))


def unit_interval(_: int, slope: Tensor) -> Tensor:
    """The nearest lower slopes that are sound."""
    return slope.clamp(0.0, 1.0)


def climb(
    bound: Callable[[Slopes], tuple[Tensor, Tensor]],
    start: Slopes,
    ascent: Ascent,
    steps: int,
    enough: Enough | None = None,
) -> tuple[Tensor, Tensor]:
    """The best of the values (n, s) of `bound` on the way, and the points (n, s, ...) that came with them.

    `enough` says of values which are high enough; the climb ends when all are.
    """
    value, where, _ = climbed(bound, start, ascent, steps, enough)
    return value, where


def climbed(
    bound: Callable[[Slopes], tuple[Tensor, Tensor]],
    start: Slopes,
    ascent: Ascent,
    steps: int,
    enough: Enough | None = None,
    *,
    fit: Fit = unit_interval,
    keep: bool = False,
) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """`climb`, and with `keep` what the best values were reached with (else the last that was tried).

    `fit` maps each set of variables, by its key, to the nearest ones that are sound.
    """
    if not start:
        return *bound(start), {}
    with torch.enable_grad():
        leaves = {at: slope.detach().clone().requires_grad_() for at, slope in start.items()}
        adam = torch.optim.Adam(leaves.values(), lr=ascent.rate)
        value, where = bound(leaves)
        best, there = value.detach(), where.detach()
        kept = {at: leaf.detach().clone() for at, leaf in leaves.items()} if keep else {}
        for _ in range(steps):
            if not value.requires_grad or (enough is not None and bool(enough(best).all())):
                break  # or a staircase stands between the value and all that could be moved
            adam.zero_grad()
            torch.autograd.backward(-value.sum(), inputs=list(leaves.values()))
            adam.step()
            for at, leaf in leaves.items():
                leaf.data.copy_(fit(at, leaf.data))
            adam.param_groups[0]["lr"] *= ascent.decay
            value, where = bound(leaves)
            better = value.detach() > best
            best = torch.where(better, value.detach(), best)
            there = torch.where(_like(better, there), where.detach(), there)
            kept = {at: torch.where(_like(better, old), leaves[at].detach(), old) for at, old in kept.items()}
    return best, there, kept or {at: leaf.detach() for at, leaf in leaves.items()}


def _like(better: Tensor, values: Tensor) -> Tensor:
    """(n, s) `better` to broadcast against `values` (n, s, ...)."""
    return better.view(*better.shape, *(1,) * (values.dim() - 2))
