"""Subproblems in which no ReLU is left to split: the network is affine there, and a linear programme is exact.

Its dual variables are betas and a mix for the bound, which is computed as any other: nothing hangs on the solver's
tolerances. Its solution is a point to look at. A ball is approached by the planes that touch it where the solution
leaves it (Kelley 1960).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sparring.certificates.pulling import linear
from sparring.certificates.subproblem import BETA, MIX, Frame, Leaves, Stem, sound

_LARGEST = 2**23  # numbers in a programme
_CUTS = 30
_PENALTY = 1e5  # for each unit by which a split is not met: where none can be, the bound grows with it


def finished(stem: Stem, leaf: Leaves) -> tuple[Leaves, Tensor] | None:
    """`leaf` (one) with its best multipliers and bound, and a point (1, *image); None if there is no programme."""
    frame = Frame(stem, leaf)
    if stem.other_lines or leaf.at.shape[1] * stem.region.low[0].numel() > _LARGEST:
        return None
    slopes, ends = _affine(frame)
    found = _solved(frame, slopes, ends)
    if found is None:
        return None
    x, duals = found
    s = leaf.mix.shape[1]
    tensor = leaf.lower.new_tensor(duals)[None]
    mix, beta = sound(MIX, tensor[:, :s]), sound(BETA, tensor[:, s:])
    best = replace(leaf, mix=mix, beta=beta, scale=torch.ones_like(leaf.scale))
    exact = Frame(stem, best)
    value, _ = exact.bound(exact.variables())
    point = leaf.lower.new_tensor(x).view(1, *stem.graph.nodes[0].shape)
    return replace(best, lower=torch.maximum(leaf.lower, value.squeeze(1))), point


def _affine(frame: Frame) -> tuple[np.ndarray, np.ndarray]:
    """Slopes (s + d, inputs) and ends (s + d,): of the constraints, and of minus sign times each split argument."""
    stem, leaf = frame.stem, frame.leaves
    question, d = leaf.question, leaf.at.shape[1]
    last = len(stem.graph.nodes) - 1
    constant, slope = linear(stem.graph, last, stem.asked[question], frame.plain_lines)
    rows, ends = [_flat(slope, constant, stem)], [(constant + stem.offset[question]).squeeze(0)]
    entries = frame.low.shape[1]
    one = torch.nn.functional.one_hot(leaf.at.long().squeeze(0), max(1, entries))[:, :entries].to(frame.low)
    each = stem.spread(one[None] * -leaf.sign.to(one).unsqueeze(2))
    total, shift = torch.zeros(d, rows[0].shape[1]).to(one), one.new_zeros(d)
    for place in frame.split_layers:
        constant, slope = linear(stem.graph, place, each[place], frame.plain_lines)
        total, shift = total + _flat(slope, constant, stem), shift + constant.squeeze(0)
    return torch.cat([*rows, total]).cpu().numpy(), torch.cat([*ends, shift]).cpu().numpy()


def _flat(slope: Tensor | None, constant: Tensor, stem: Stem) -> Tensor:
    """(k, inputs) slopes, zero where there are none."""
    if slope is None:
        return constant.new_zeros(constant.shape[1], stem.region.low[0].numel())
    return slope.squeeze(0).flatten(1)


def _solved(frame: Frame, slopes: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """A solution x and the dual variables of all rows: min t + penalty r, asked <= t, -sign z <= r."""
    from scipy.optimize import linprog  # slow to import, and rarely needed

    if not (np.isfinite(slopes).all() and np.isfinite(ends).all()):
        return None
    where, s = frame.region, frame.leaves.mix.shape[1]
    low, high, x0 = (end.flatten().cpu().numpy() for end in (where.low, where.high, where.x))
    split = np.arange(len(ends)) >= s
    matrix = np.column_stack([slopes, -1.0 * ~split, -1.0 * split])
    goal = np.concatenate([np.zeros(len(low)), [1.0, _PENALTY * max(1.0, np.abs(slopes[:s]).max())]])
    limits = [*zip(low, high, strict=True), (None, None), (0, None)]
    cuts: list[np.ndarray] = []
    reach: list[float] = []
    for _ in range(_CUTS if where.radius is not None else 1):
        both = np.vstack([matrix, *(np.append(cut, [0.0, 0.0]) for cut in cuts)])
        found = linprog(goal, both, np.concatenate([-ends, reach]), bounds=limits, method="highs")
        if found.status:
            return None
        x, away = found.x[:-2], found.x[:-2] - x0
        length = float(np.linalg.norm(away))
        if where.radius is None or length <= where.radius * (1 + 1e-9):
            break
        cuts.append(away / length)
        reach.append(float(away @ x0 / length) + where.radius)
    return x, -found.ineqlin.marginals[: len(ends)]
