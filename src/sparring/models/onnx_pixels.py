"""An ONNX node, and the operators that look at neighbouring pixels: convolution, pooling, resizing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Node:
    """One node: its operator, its attributes as plain values or tensors, and how many outputs it has."""

    op: str
    attributes: dict[str, Any]
    opset: int
    outputs: int

    def get(self, name: str, default: Any = None) -> Any:
        """The attribute called `name`."""
        return self.attributes.get(name, default)

    def ints(self, name: str, given: Tensor | None) -> list[int] | None:
        """Integers that are an attribute in old opsets and an input in new ones; `None` if neither is there."""
        found: list[int] | None = self.get(name) if given is None else given.flatten().tolist()
        return found


def _pads(node: Node, sizes: Sequence[int], kernel: Sequence[int]) -> list[tuple[int, int]]:
    """Cells before and after each spatial axis of `sizes`."""
    rank, auto = len(kernel), node.get("auto_pad", "NOTSET")
    if auto == "NOTSET":
        pads = node.get("pads", [0] * 2 * rank)
        return list(zip(pads[:rank], pads[rank:], strict=True))
    found = []
    strides, dilations = node.get("strides", [1] * rank), node.get("dilations", [1] * rank)
    for size, reach, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max(0, (-(-size // stride) - 1) * stride + (reach - 1) * dilation + 1 - size)
        total = 0 if auto == "VALID" else total
        small = total // 2
        found.append((small, total - small) if auto == "SAME_UPPER" else (total - small, small))
    return found


def pad(x: Tensor, pads: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    """Return `x` with (before, after) cells of `value` at its last axes, or cut where negative."""
    if not any(before or after for before, after in pads):
        return x
    return F.pad(x, [cells for pair in reversed(pads) for cells in pair], value=value)


def conv(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Conv: a convolution over one to three axes."""
    rank = x.dim() - 2
    pads = _pads(node, x.shape[2:], weight.shape[2:])
    even = all(before == after for before, after in pads)
    run: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    return run(
        x if even else pad(x, pads),
        weight,
        bias,
        stride=node.get("strides", [1] * rank),
        padding=[before for before, _ in pads] if even else 0,
        dilation=node.get("dilations", [1] * rank),
        groups=node.get("group", 1),
    )


def conv_transpose(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """ConvTranspose: the whole of it, then cut by the pads."""
    rank = x.dim() - 2
    run: Callable[..., Tensor] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    whole = run(
        x,
        weight,
        bias,
        stride=node.get("strides", [1] * rank),
        output_padding=node.get("output_padding", [0] * rank),
        groups=node.get("group", 1),
        dilation=node.get("dilations", [1] * rank),
    )
    return pad(whole, [(-before, -after) for before, after in _pads(node, x.shape[2:], weight.shape[2:])])


@dataclass(frozen=True)
class _Windows:
    """Where a pooling's windows lie: `beyond` are cells that only ceil_mode reaches (negative: never reached)."""

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    pads: list[tuple[int, int]]
    beyond: list[tuple[int, int]]

    @staticmethod
    def of(node: Node, x: Tensor) -> _Windows:
        """Those of `node` over images `x`."""
        kernel: list[int] = node.get("kernel_shape")
        rank = len(kernel)
        strides, dilations = node.get("strides", [1] * rank), node.get("dilations", [1] * rank)
        pads, beyond = _pads(node, x.shape[2:], kernel), []
        for size, reach, stride, dilation, (before, after) in zip(
            x.shape[2:], kernel, strides, dilations, pads, strict=True
        ):
            span, whole = (reach - 1) * dilation + 1, before + size + after
            steps = (whole - span) // stride
            if node.get("ceil_mode", 0):
                steps = -(-(whole - span) // stride)
                steps -= steps * stride >= size + before  # a window that starts in the padding is none
            beyond.append((0, steps * stride + span - whole))
        return _Windows(kernel, strides, dilations, pads, beyond)


def max_pool(node: Node, x: Tensor) -> Tensor:
    """MaxPool: what it pads with never wins."""
    at = _Windows.of(node, x)
    run: Callable[..., Tensor] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(at.kernel) - 1]
    padded = pad(pad(x, at.pads, -math.inf), at.beyond, -math.inf)
    return run(padded, at.kernel, at.strides, 0, at.dilations)


def average_pool(node: Node, x: Tensor) -> Tensor:
    """AveragePool: a mean over the cells that count."""
    at = _Windows.of(node, x)
    run: Callable[..., Tensor] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(at.kernel) - 1]
    mean = run(pad(pad(x, at.pads), at.beyond), at.kernel, at.strides)
    counted = pad(x.new_ones(1, 1, *x.shape[2:]), at.pads, float(node.get("count_include_pad", 0)))
    return mean / run(pad(counted, at.beyond), at.kernel, at.strides)


# Resizing: each axis by itself, so that every spacing of the standard is one formula.


def _places(spacing: str, size: int, wanted: int, scale: float) -> Tensor:
    """Where each of `wanted` cells lies among `size` cells, in float64."""
    cells = torch.arange(wanted, dtype=torch.float64)
    if spacing == "align_corners":
        return cells * ((size - 1) / max(1, wanted - 1))
    if spacing == "asymmetric":
        return cells / scale
    return torch.zeros_like(cells) if spacing == "pytorch_half_pixel" and wanted == 1 else (cells + 0.5) / scale - 0.5


_NEAREST: dict[str, Callable[[Tensor], Tensor]] = {
    "round_prefer_floor": lambda at: (at - 0.5).ceil(),
    "round_prefer_ceil": lambda at: (at + 0.5).floor(),
    "floor": torch.floor,
    "ceil": torch.ceil,
}


def _along(node: Node, x: Tensor, axis: int, wanted: int, scale: float) -> Tensor:
    old, size = node.opset < 11 or node.op == "Upsample", x.shape[axis]
    spacing = "asymmetric" if old else node.get("coordinate_transformation_mode", "half_pixel")
    at = _places(spacing, size, wanted, scale)
    if node.get("mode", "nearest") == "nearest":
        cells = _NEAREST["floor" if old else node.get("nearest_mode", "round_prefer_floor")](at)
        return x.index_select(axis, cells.clamp(0, size - 1).long().to(x.device))
    at = at.clamp(0, size - 1)
    low = at.floor().long()
    share = (at - low).to(x).view(-1, *[1] * (x.dim() - axis - 1))
    high = (low + 1).clamp_max(size - 1)
    return torch.lerp(x.index_select(axis, low.to(x.device)), x.index_select(axis, high.to(x.device)), share)


def resize(node: Node, x: Tensor, *given: Tensor | None) -> Tensor:
    """Resize and Upsample, nearest and linear."""
    axes = [axis % x.dim() for axis in node.get("axes", range(x.dim()))]
    roomy = node.op == "Resize" and node.opset >= 11  # then the inputs are roi, scales, sizes
    scales = (given[1] if len(given) > 1 else None) if roomy else given[0] if given else None
    factors = node.get("scales") if scales is None else scales.tolist()
    sizes = given[2].tolist() if len(given) > 2 and given[2] is not None else None
    for place, axis in enumerate(axes):
        scale = sizes[place] / x.shape[axis] if sizes else factors[place]
        wanted = sizes[place] if sizes else math.floor(x.shape[axis] * scale)
        if scale != 1 or wanted != x.shape[axis]:
            x = _along(node, x, axis, wanted, scale)
    return x
