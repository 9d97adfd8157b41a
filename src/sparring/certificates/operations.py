"""Torch's own operations as nodes: linear ones, ReLU, sigmoid, tanh, staircases, and what is written with these."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from sparring.certificates.operators import (
    Activation,
    Conv,
    Dense,
    Linear,
    Maximum,
    Rearrange,
    Reshape,
    Scale,
    Sum,
)


class Unsupported(Exception):
    """An operation that cannot be bounded here."""


@dataclass(frozen=True)
class Ref:
    """A node that depends on the images."""

    place: int
    shape: tuple[int, ...]  # of one row
    like: Tensor  # (0,) of the type and on the device of its values


class Add(Protocol):
    """Appends a node."""

    def __call__(self, op: Linear | Activation, *inputs: Ref) -> Ref:
        """The node that does `op` to `inputs`."""
        ...


# Linear operations with weights.


def _addmm(add: Add, bias: Tensor, x: Ref, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Ref:
    return add(Dense(alpha * weight.t(), (beta * bias).expand(weight.shape[1])), x)


def _mm(add: Add, x: Ref, weight: Any) -> Ref:
    if isinstance(weight, Ref):
        raise Unsupported("expected a product of values with weights, got one of two values")
    return add(Dense(weight.t(), None), x)


def _convolution(
    add: Add,
    x: Ref,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    _: list[int],
    groups: int,
) -> Ref:
    if transposed or weight.dim() != 4:
        raise Unsupported("expected convolutions over two axes, got a transposed one or another number of axes")
    return add(Conv(weight, bias, x.shape, tuple(stride), tuple(padding), tuple(dilation), groups), x)


def _batch_norm(
    add: Add, x: Ref, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, *rest: Any
) -> tuple[Ref, None, None]:
    training, eps = (rest[0], rest[-1]) if len(rest) == 3 else (False, rest[-1])
    if training:
        raise Unsupported(
            "expected batch normalisation in eval mode, got train mode, which mixes rows; call net.eval()"
        )
    shape = (-1, *(1,) * (len(x.shape) - 1))
    factor = (var + eps).rsqrt() if weight is None else weight * (var + eps).rsqrt()
    shift = -mean * factor if bias is None else bias - mean * factor
    added = (mean * factor).abs() if bias is None else (mean * factor).abs() + bias.abs()
    return add(Scale(factor.view(shape), shift.view(shape), added.view(shape)), x), None, None


# Arithmetic.


def _scale(add: Add, x: Ref, factor: Any, shift: Any = None) -> Ref:
    def of_a_row(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.dim() > len(x.shape):
            if value.shape[0] != 1:
                raise Unsupported("expected constants for one row, got some for a whole batch")
            value = value[0]
        fits = value.dim() <= len(x.shape) and all(
            size in (1, wanted) for size, wanted in zip(value.shape[::-1], x.shape[::-1], strict=False)
        )
        if not fits:
            raise Unsupported(f"expected constants that fit a row {x.shape}, got {tuple(value.shape)}")
        return value.to(x.like)

    return add(Scale(of_a_row(_tensor(factor)), None if shift is None else of_a_row(_tensor(shift))), x)


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if torch.finfo(torch.float32).max < abs(value) < math.inf:
        raise Unsupported(f"expected numbers that float32 can hold, got {value:g}")
    return torch.tensor(float(value), dtype=torch.float64)


def _sum(add: Add, a: Any, b: Any, signs: tuple[float, float]) -> Ref:
    if isinstance(a, Ref) and isinstance(b, Ref):
        if a.shape != b.shape:
            raise Unsupported(f"expected two values of one shape to add, got {a.shape} and {b.shape}")
        return add(Sum(signs), a, b)
    if isinstance(a, Ref):
        return _scale(add, a, 1.0, signs[1] * b)
    return _scale(add, b, signs[1], signs[0] * a)


def _add(add: Add, a: Any, b: Any, *, alpha: float = 1) -> Ref:
    return _sum(add, a, b, (1.0, float(alpha)))


def _sub(add: Add, a: Any, b: Any, *, alpha: float = 1) -> Ref:
    return _sum(add, a, b, (1.0, -float(alpha)))


def _mul(add: Add, a: Any, b: Any) -> Ref:
    if isinstance(a, Ref) and isinstance(b, Ref):
        raise Unsupported("expected a product with a constant, got one of two values")
    return _scale(add, a, b) if isinstance(a, Ref) else _scale(add, b, a)


def _div(add: Add, a: Any, b: Any) -> Ref:
    if isinstance(b, Ref):
        raise Unsupported("expected a quotient by a constant, got one by a value")
    return _scale(add, a, 1.0 / b)


# Functions of one number, and the maximum.


def _activation(kind: str) -> Callable[..., Ref]:
    return lambda add, x: add(Activation(kind), x)


def _compared(kind: str, sign: float) -> Callable[..., Ref]:
    """1 where sign (a - b) is `kind`, else 0. It is never computed as a difference: that is on the safe side."""

    def lowered(add: Add, a: Any, b: Any) -> Ref:
        if isinstance(a, Ref) and isinstance(b, Ref):
            raise Unsupported("expected a value compared with a constant, got one compared with another value")
        apart = _scale(add, a, sign, -sign * b) if isinstance(a, Ref) else _scale(add, b, -sign, sign * a)
        return add(Activation(kind), apart)

    return lowered


def _where(add: Add, condition: Ref, a: Any, b: Any) -> Ref:
    if isinstance(a, Ref) or isinstance(b, Ref):
        raise Unsupported("expected a choice between constants, got one between values")
    a, b = _tensor(a), _tensor(b)
    return _scale(add, condition, a - b, b)


def _leaky(add: Add, x: Ref, slope: float = 0.01) -> Ref:
    return add(Sum((slope, 1.0 - slope)), x, add(Activation("relu"), x))


def _clamp(add: Add, x: Ref, low: float | None = None, high: float | None = None) -> Ref:
    if low is not None:
        x = _scale(add, add(Activation("relu"), _scale(add, x, 1.0, -low)), 1.0, low)
    if high is not None:
        x = _scale(add, add(Activation("relu"), _scale(add, x, -1.0, high)), -1.0, high)
    return x


def _maximum(add: Add, a: Ref, b: Ref) -> Ref:
    return add(Maximum(), a, b, add(Activation("relu"), add(Sum((1.0, -1.0)), a, b)))


# Pooling.


def _pair(value: Any) -> list[int]:
    found = list(value) if isinstance(value, list | tuple) else [value]
    return found * 2 if len(found) == 1 else found


def _average(
    add: Add,
    x: Ref,
    kernel: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Ref:
    if divisor is not None and divisor < 0:
        raise Unsupported(f"expected an average with a positive divisor, got {divisor}")
    options = (_pair(kernel), _pair(stride or kernel), _pair(padding), ceil_mode, count_include_pad, divisor)
    return add(Rearrange(lambda t: F.avg_pool2d(t, *options), x.shape, math.prod(_pair(kernel)) + 1), x)


def _adaptive(add: Add, x: Ref, size: list[int]) -> Ref:
    terms = math.prod(-(-a // b) + 1 for a, b in zip(x.shape[-2:], size, strict=True))
    return add(Rearrange(lambda t: F.adaptive_avg_pool2d(t, (size[0], size[1])), x.shape, terms), x)


def _mean(add: Add, x: Ref, dims: list[int], keepdim: bool = False) -> Ref:
    terms = math.prod(x.shape[_axis(x, d)] for d in dims) + 1
    return add(Rearrange(lambda t: t.mean(dims, keepdim), x.shape, terms), x)


def _total(add: Add, x: Ref, dims: list[int], keepdim: bool = False) -> Ref:
    terms = math.prod(x.shape[_axis(x, d)] for d in dims)
    return add(Rearrange(lambda t: t.sum(dims, keepdim), x.shape, terms), x)


def _max_pool(
    add: Add,
    x: Ref,
    kernel: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> tuple[Ref, None]:
    """Columns first, then rows: the maximum over a window is one over its cells, two at a time.

    A cell of the padding is replaced by the nearest one of the image, which is always in the same window.
    """
    if _pair(dilation) != [1, 1]:
        raise Unsupported("expected maximum pooling without dilation")
    kernel, strides, pads = _pair(kernel), _pair(stride or kernel), _pair(padding)
    with torch.no_grad():
        out = F.max_pool2d(torch.zeros(1, *x.shape), kernel, strides, pads, 1, ceil_mode).shape[-2:]
    for axis in (-1, -2):
        cells = [
            (torch.arange(out[axis]) * strides[axis] - pads[axis] + step).clamp(0, x.shape[axis] - 1)
            for step in range(kernel[axis])
        ]
        parts = [add(Rearrange(_picker(axis, index), x.shape), x) for index in cells]
        while len(parts) > 1:
            pairs = zip(parts[::2], parts[1::2], strict=False)
            parts = [_maximum(add, a, b) for a, b in pairs] + parts[len(parts) // 2 * 2 :]
        x = parts[0]
    return x, None


def _picker(axis: int, index: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda t: t.index_select(axis, index.to(t.device))


# Shapes.


def _axis(x: Ref, dim: int) -> int:
    """The axis of a row that is axis `dim` of a batch."""
    rank = len(x.shape) + 1
    if dim % rank == 0:
        raise Unsupported("expected rows that do not mix, got an operation along the batch")
    return dim % rank - 1


def _view(add: Add, x: Ref, size: list[int]) -> Ref:
    known = torch.zeros(size[0], *x.shape, device="meta").reshape(size).shape[1:] if size[0] > 0 else None
    if known is None or math.prod(known) != math.prod(x.shape):
        raise Unsupported(f"expected rows that do not mix, got a reshape of {('n', *x.shape)} to {size}")
    return add(Reshape(lambda t: t.reshape(len(t), *known), x.shape), x)


def _fixed(target: Callable[..., Tensor], dims: Callable[..., list[int]]) -> Callable[..., Ref]:
    """`target` with options that name the axes `dims`, of which none may be that of the rows."""

    def lowered(add: Add, x: Ref, *options: Any) -> Ref:
        for dim in dims(*options):
            _axis(x, dim)
        return add(Rearrange(lambda t: target(t, *options), x.shape), x)

    return lowered


def _unsqueeze(add: Add, x: Ref, dim: int) -> Ref:
    if dim % (len(x.shape) + 2) == 0:  # an axis may be put behind the last one
        raise Unsupported("expected rows that do not mix, got a new axis in front of the batch")
    return add(Rearrange(lambda t: torch.unsqueeze(t, dim), x.shape), x)


def _permute(add: Add, x: Ref, dims: list[int]) -> Ref:
    if dims[0] != 0:
        raise Unsupported("expected rows that do not mix, got a permutation that moves the batch")
    return add(Rearrange(lambda t: t.permute(dims), x.shape), x)


def _slice(add: Add, x: Ref, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Ref:
    if dim == 0 and not start and step == 1:  # all rows come back, as has been checked
        return x
    _axis(x, dim)
    return add(Rearrange(lambda t: torch.ops.aten.slice.Tensor(t, dim, start, end, step), x.shape), x)


def _pad(add: Add, x: Ref, pads: list[int], value: float = 0) -> Ref:
    if len(pads) > 2 * len(x.shape):
        raise Unsupported("expected rows that do not mix, got a padding along the batch")
    padded = add(Rearrange(lambda t: F.pad(t, pads), x.shape), x)
    if not value:
        return padded
    frame = F.pad(torch.zeros(x.shape, dtype=torch.float64), pads, value=float(value))
    return _scale(add, padded, 1.0, frame)


def _cat(add: Add, parts: list[Ref], dim: int = 0) -> Ref:
    """The sum of the pieces, each with zeros where the others stand."""
    if not all(isinstance(part, Ref) for part in parts):
        raise Unsupported("expected values to join, got a constant among them")
    if len(parts) == 1:
        return parts[0]
    axis = _axis(parts[0], dim)
    whole, done, padded = sum(part.shape[axis] for part in parts), 0, []
    for part in parts:
        size = part.shape[axis]
        ends = [0, 0] * (len(part.shape) - 1 - axis) + [done, whole - done - size]
        padded.append(add(Rearrange(_padder(ends), part.shape), part))
        done += size
    return add(Sum((1.0,) * len(parts)), *padded)


def _padder(ends: list[int]) -> Callable[[Tensor], Tensor]:
    return lambda t: F.pad(t, ends)


def _same(add: Add, x: Ref, *_: Any, **__: Any) -> Ref:
    return x


LOWER: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("clone", "alias", "detach", "contiguous", "_to_copy", "lift_fresh_copy"), _same),
    **dict.fromkeys(("view", "_unsafe_view", "reshape"), _view),
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"), _batch_norm),
    "addmm": _addmm,
    "mm": _mm,
    "convolution": _convolution,
    "add": _add,
    "sub": _sub,
    "rsub": lambda add, a, b, alpha=1: _sum(add, b, a, (1.0, -float(alpha))),
    "mul": _mul,
    "div": _div,
    "neg": lambda add, x: _scale(add, x, -1.0),
    "relu": _activation("relu"),
    "sigmoid": _activation("sigmoid"),
    "tanh": _activation("tanh"),
    **{kind: _activation(kind) for kind in ("round", "floor", "ceil", "trunc", "sign")},
    "ge": _compared("nonnegative", 1.0),
    "gt": _compared("positive", 1.0),
    "le": _compared("nonnegative", -1.0),
    "lt": _compared("positive", -1.0),
    "bitwise_not": lambda add, x: _scale(add, x, -1.0, 1.0),  # torch has it for answers of comparisons alone
    "where": _where,
    "leaky_relu": _leaky,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": lambda add, x, high: _clamp(add, x, None, high),
    "hardtanh": lambda add, x, low=-1.0, high=1.0: _clamp(add, x, low, high),
    "maximum": _maximum,
    "avg_pool2d": _average,
    "_adaptive_avg_pool2d": _adaptive,
    "mean": _mean,
    "sum": _total,
    "max_pool2d_with_indices": _max_pool,
    "permute": _permute,
    "transpose": _fixed(torch.transpose, lambda a, b: [a, b]),
    "squeeze": _fixed(torch.squeeze, lambda dim: dim if isinstance(dim, list) else [dim]),
    "unsqueeze": _unsqueeze,
    "select": _fixed(torch.select, lambda dim, index: [dim]),
    "upsample_nearest2d": _fixed(torch.ops.aten.upsample_nearest2d, lambda *_: []),
    "slice": _slice,
    "constant_pad_nd": _pad,
    "cat": _cat,
}
