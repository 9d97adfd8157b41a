"""Spatial: turned and moved images, all on a grid or some at random; labels only."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from sparring.core import noise
from sparring.core.attack import Observation, State
from sparring.core.batch import Batch
from sparring.core.errors import UsageError
from sparring.core.model import Access


@dataclass(frozen=True)
class SpatialState(State):
    """How far down its list a row has come."""

    k: Tensor  # (n,) queries answered


@dataclass(frozen=True)
class Spatial:
    """The image turned by up to `angle` degrees, then moved by up to `shift` pixels down or up and right or left.

    Engstrom et al. 2019, sections 2 and 4. It is the transforms that bound the attacker, no norm: every point asked
    about is one of them, of the clean image. With `draws` left out it is their grid search over `angles` x `shifts`
    x `shifts` values, evenly spaced, from the mildest on (the untouched image first); else their worst-of-k: the
    untouched image, then so many transforms drawn evenly. Left out, `shift` is a tenth of the longer side: 3 pixels
    on MNIST and CIFAR-10, as in the paper. Pixels in between are bilinear, and what comes in from outside the frame
    is the low bound (black).
    """

    angle: float = 30.0
    shift: float | None = None
    angles: int = 31
    shifts: int = 5
    draws: int | None = None

    name: ClassVar[str] = "spatial"
    version: ClassVar[int] = 1
    needs: ClassVar[Access] = Access.DECISION
    norms: ClassVar[tuple[str, ...]] = ("unbounded",)
    paper: ClassVar[str] = "Engstrom et al. 2019, arXiv:1712.02779"
    minimizes: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False
    restricted: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse a grid without the untouched image in it, and a number of draws that are none."""
        for what, value in (("angles", self.angles), ("shifts", self.shifts)):
            if value < 1 or value % 2 == 0:
                raise UsageError(f"expected an odd number of {what}, so that none at all is one of them; got {value}")
        if self.draws is not None and self.draws < 1:
            raise UsageError(f"expected at least 1 draw, or none to search the grid; got {self.draws}")

    def init(self, batch: Batch) -> SpatialState:
        """Ask about the untouched image."""
        last = torch.full_like(batch.targeted, self.draws is None and len(_grid(*self._reach(batch))) == 1)
        return SpatialState(batch.x, last, torch.zeros_like(batch.y))

    def step(self, batch: Batch, state: SpatialState, seen: Observation) -> SpatialState:
        """Ask about the next transform."""
        k, reach = state.k + 1, self._reach(batch)
        if self.draws is None:
            table = _grid(*reach).to(k.device)
            degrees, down, right = table[k.clamp_max(len(table) - 1)].T
            last = len(table) - 1
        else:
            u = 2 * noise.uniform(batch.key, (3,), state.k).double() - 1
            degrees, down, right = (u * u.new_tensor([reach[0], reach[1], reach[1]])).T
            last = self.draws
        x = batch.project(transform(batch.x, degrees, down, right, batch.threat.bounds[0]))
        return replace(state, x=x, k=k, done=k >= last)

    def _reach(self, batch: Batch) -> tuple[float, float, int, int]:
        """The largest angle and shift, and how many of each are on the grid."""
        shift = round(max(batch.x.shape[2:]) / 10) if self.shift is None else self.shift
        return self.angle, shift, self.angles, self.shifts


@cache
def _grid(angle: float, shift: float, angles: int, shifts: int) -> Tensor:
    """(transforms, 3) degrees, down and right, in the order of the sum of their shares of the largest."""
    turns, moves = _steps(angles if angle else 1), _steps(shifts if shift else 1)
    shares = sorted(product(turns, moves, moves), key=lambda t: sum(map(abs, t)))
    return torch.tensor(shares, dtype=torch.float64) * torch.tensor([angle, shift, shift], dtype=torch.float64)


def _steps(count: int) -> list[float]:
    """`count` numbers from -1 to 1, evenly spaced, with 0 exactly in the middle."""
    half = count // 2
    return [i / half for i in range(-half, half + 1)] if half else [0.0]


def transform(x: Tensor, degrees: Tensor, down: Tensor, right: Tensor, outside: float) -> Tensor:
    """(n, c, h, w) images turned counterclockwise about their middle, then moved, each by its own (n,) amounts.

    The colour of a pixel is read where it comes from (Engstrom et al. 2019, section 2), bilinearly among the four
    pixels around that place, of which those beyond the frame have the value `outside`. In float64: an angle of 0 and
    whole pixels are exact.
    """
    height, width = x.shape[2:]
    turn = degrees.double()[:, None, None] * (math.pi / 180)
    row = torch.arange(height, dtype=torch.float64, device=x.device)[:, None] - (height - 1) / 2
    column = torch.arange(width, dtype=torch.float64, device=x.device) - (width - 1) / 2
    row, column = row - down.double()[:, None, None], column - right.double()[:, None, None]
    cos, sin = turn.cos(), turn.sin()
    from_row = cos * row + sin * column + (height - 1) / 2
    from_column = cos * column - sin * row + (width - 1) / 2
    top, left = from_row.floor(), from_column.floor()
    total = torch.zeros_like(x, dtype=torch.float64)
    for below, beside in product((0, 1), (0, 1)):
        i, j = top + below, left + beside
        weight = (1 - (from_row - i).abs()) * (1 - (from_column - j).abs())
        inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
        at = (i.clamp(0, height - 1) * width + j.clamp(0, width - 1)).long().flatten(1)[:, None]
        colour = x.double().flatten(2).gather(2, at.expand(-1, x.shape[1], -1)).view_as(x)
        total = total + weight[:, None] * torch.where(inside[:, None], colour, outside)
    return total.to(x.dtype)
