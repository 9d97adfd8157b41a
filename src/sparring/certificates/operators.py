"""What the nodes of a network do, forwards, to intervals, and backwards to linear functions.

A value is (m, *shape): m rows of one node. Shapes in the docstrings leave out the rows.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Interval = tuple[Tensor, Tensor]  # the least and the largest value


class Linear(ABC):
    """W x + b of one or several inputs."""

    @property
    @abstractmethod
    def terms(self) -> int:
        """How many products are summed into one entry, at most; 0 where numbers only move, and nothing is rounded."""

    @property
    def offset(self) -> Tensor | None:
        """B, to be broadcast to the shape; None where it is zero."""
        return None

    @property
    def size(self) -> Tensor | None:
        """The sum of the absolute constants that a model adds on the way to b; None where there are none."""
        return None if self.offset is None else self.offset.abs()

    @abstractmethod
    def forward(self, *inputs: Tensor) -> Tensor:
        """W x + b."""

    @abstractmethod
    def spread(self, *radii: Tensor) -> Tensor:
        """|W| r: how far W x moves when x moves by up to `radii`."""

    @abstractmethod
    def transpose(self, a: Tensor) -> tuple[Tensor | None, ...]:
        """a W for linear functions `a` (m, *shape): one for each input, None where it is zero."""

    def interval(self, *inputs: Interval) -> Interval:
        """The values that W x + b takes when each input lies in its interval."""
        middle = self.forward(*((low + high) / 2 for low, high in inputs))
        reach = self.spread(*((high - low) / 2 for low, high in inputs))
        return middle - reach, middle + reach


@dataclass(frozen=True, eq=False)
class Dense(Linear):
    """A full matrix `weight` (out, in) and `bias` (out,)."""

    weight: Tensor
    bias: Tensor | None

    @property
    def terms(self) -> int:
        """The inputs and the bias."""
        return self.weight.shape[1] + 1

    @property
    def offset(self) -> Tensor | None:
        """The bias."""
        return self.bias

    def forward(self, *inputs: Tensor) -> Tensor:
        """W x + b."""
        return F.linear(inputs[0], self.weight, self.bias)

    def spread(self, *radii: Tensor) -> Tensor:
        """|W| r."""
        return F.linear(radii[0], self.weight.abs())

    def transpose(self, a: Tensor) -> tuple[Tensor | None, ...]:
        """a W."""
        return (a @ self.weight,)


@dataclass(frozen=True, eq=False)
class Conv(Linear):
    """A convolution over two axes: `weight` (out, in / groups, kh, kw), from `shape` (in, h, w)."""

    weight: Tensor
    bias: Tensor | None
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def terms(self) -> int:
        """The inputs of one output, and the bias."""
        return math.prod(self.weight.shape[1:]) + 1

    @property
    def offset(self) -> Tensor | None:
        """The bias of each channel."""
        return None if self.bias is None else self.bias.view(-1, 1, 1)

    def forward(self, *inputs: Tensor) -> Tensor:
        """W x + b."""
        return F.conv2d(inputs[0], self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def spread(self, *radii: Tensor) -> Tensor:
        """|W| r."""
        return F.conv2d(radii[0], self.weight.abs(), None, self.stride, self.padding, self.dilation, self.groups)

    def transpose(self, a: Tensor) -> tuple[Tensor | None, ...]:
        """The transposed convolution; input cells that no window reaches get zero."""
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.weight.shape[2:], strict=True)]
        ends = zip(self.shape[1:], a.shape[2:], self.stride, self.padding, reach, strict=True)
        spare = [size - ((out - 1) * stride - 2 * pad + span) for size, out, stride, pad, span in ends]
        return (
            F.conv_transpose2d(a, self.weight, None, self.stride, self.padding, spare, self.groups, self.dilation),
        )


@dataclass(frozen=True, eq=False)
class Scale(Linear):
    """`factor` x + `shift`, entry by entry: normalisation, and arithmetic with constants.

    `added` is the sum of the absolute constants where a model adds several that make up `shift`.
    """

    factor: Tensor
    shift: Tensor | None
    added: Tensor | None = None

    @property
    def terms(self) -> int:
        """Batch normalisation takes the most operations: subtract, divide by a root, multiply, add."""
        return 6

    @property
    def offset(self) -> Tensor | None:
        """The shift."""
        return self.shift

    @property
    def size(self) -> Tensor | None:
        """The constants as the model adds them."""
        return super().size if self.added is None else self.added

    def forward(self, *inputs: Tensor) -> Tensor:
        """Factor times x, plus shift."""
        scaled = inputs[0] * self.factor
        return scaled if self.shift is None else scaled + self.shift

    def spread(self, *radii: Tensor) -> Tensor:
        """|factor| r."""
        return radii[0] * self.factor.abs()

    def transpose(self, a: Tensor) -> tuple[Tensor | None, ...]:
        """The factor once more."""
        return (a * self.factor,)


@dataclass(frozen=True, eq=False)
class Rearrange(Linear):
    """A linear `run` of rows whose weights are all zero or more, without a bias: reshape, slice, pad, average."""

    run: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]  # of its input
    terms: int = 0

    def forward(self, *inputs: Tensor) -> Tensor:
        """What it does."""
        return self.run(inputs[0])

    def spread(self, *radii: Tensor) -> Tensor:
        """The same: no weight is negative."""
        return self.run(radii[0])

    def transpose(self, a: Tensor) -> tuple[Tensor | None, ...]:
        """Its vector-Jacobian product, which for a linear map is the transpose."""
        pull = torch.func.vjp(self.run, a.new_zeros(len(a), *self.shape))[1]
        return (pull(a)[0],)


@dataclass(frozen=True, eq=False)
class Reshape(Rearrange):
    """The same numbers in another shape."""

    def transpose(self, a: Tensor) -> tuple[Tensor | None, ...]:
        """The shape it came in."""
        return (a.reshape(len(a), *self.shape),)


@dataclass(frozen=True, eq=False)
class Sum(Linear):
    """Inputs of one shape, each times its factor: residual connections, differences, joined pieces."""

    factors: tuple[float, ...]

    @property
    def terms(self) -> int:
        """One product each."""
        return 2 * len(self.factors)

    def forward(self, *inputs: Tensor) -> Tensor:
        """The weighted sum."""
        return sum_of([x if f == 1 else f * x for f, x in zip(self.factors, inputs, strict=True)])

    def spread(self, *radii: Tensor) -> Tensor:
        """The sum with absolute weights."""
        return sum_of([abs(f) * r for f, r in zip(self.factors, radii, strict=True)])

    def transpose(self, a: Tensor) -> tuple[Tensor | None, ...]:
        """The factor of each."""
        return tuple(a if f == 1 else f * a for f in self.factors)


@dataclass(frozen=True, eq=False)
class Maximum(Linear):
    """max(p, q) of (p, q, relu(p - q)): q + relu(p - q) as a linear function, the larger ends as an interval."""

    terms: int = 0

    def forward(self, *inputs: Tensor) -> Tensor:
        """The larger of the first two."""
        return torch.maximum(inputs[0], inputs[1])

    def spread(self, *radii: Tensor) -> Tensor:
        """The larger reach of the first two: the maximum moves no further than either."""
        return torch.maximum(radii[0], radii[1])

    def transpose(self, a: Tensor) -> tuple[Tensor | None, ...]:
        """Of q + relu(p - q)."""
        return None, a, a

    def interval(self, *inputs: Interval) -> Interval:
        """Monotone in both."""
        (low, high), (other_low, other_high), _ = inputs
        return torch.maximum(low, other_low), torch.maximum(high, other_high)


SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
STAIRS: dict[str, Callable[[Tensor], Tensor]] = {
    "round": torch.round,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "trunc": torch.trunc,
    "sign": torch.sign,
    "positive": lambda x: (x > 0).to(x.dtype),
    "nonnegative": lambda x: (x >= 0).to(x.dtype),
}


@dataclass(frozen=True)
class Activation:
    """A non-decreasing function of one number, applied entry by entry: `kind` is of `SMOOTH` or of `STAIRS`."""

    kind: str

    @property
    def steps(self) -> bool:
        """Is it a staircase, flat but for its jumps?"""
        return self.kind in STAIRS

    def forward(self, x: Tensor) -> Tensor:
        """Its values; through a staircase the gradient goes as if it were not there, for whoever searches."""
        if not self.steps:
            return SMOOTH[self.kind](x)
        value = STAIRS[self.kind](x.detach())
        return value + (x - x.detach()) if x.requires_grad else value


@dataclass(frozen=True)
class Input:
    """The images."""


Operator = Linear | Activation | Input


def sum_of(parts: list[Tensor]) -> Tensor:
    """The sum of one or more tensors."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
