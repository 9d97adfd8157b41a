"""ONNX operators as torch operations: https://onnx.ai/onnx/operators. Opset 7 and later, inference only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sparring.core.errors import ModelError
from sparring.models.onnx_pixels import Node, average_pool, conv, conv_transpose, max_pool, pad, resize

Result = Tensor | Sequence[Tensor]

# The numbers of onnx.TensorProto.DataType.
DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}


def lacking(node: Node) -> str | None:
    """What of `node` has no counterpart here, in words; `None` if all of it has."""
    if node.op not in OPERATORS:
        return node.op
    for name, allowed in _ALLOWED.get(node.op, {}).items():
        value = node.get(name)
        if value is not None and not set(value if isinstance(value, list) else [value]) <= allowed:
            return f"{node.op} with {name}={value}"
    if node.outputs > 1 and node.op not in ("Split", "Dropout"):
        return f"{node.op} with {node.outputs} outputs"
    return None


_SPACING = {"half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"}
_ALLOWED: dict[str, dict[str, set[Any]]] = {
    "AveragePool": {"dilations": {1}},
    "BatchNormalization": {"training_mode": {0}, "spatial": {1}},
    "Cast": {"to": set(DTYPES)},
    "ConvTranspose": {"auto_pad": {"NOTSET", "VALID"}, "output_shape": set()},
    "LRN": {"size": set(range(1, 1000, 2))},
    "Pad": {"mode": {"constant", "reflect", "edge", "wrap"}},
    "Resize": {
        "mode": {"nearest", "linear"},
        "antialias": {0},
        "coordinate_transformation_mode": _SPACING,
        "keep_aspect_ratio_policy": {"stretch"},
    },
    "SpaceToDepth": {"mode": {"DCR"}},
    "Upsample": {"mode": {"nearest", "linear"}},
}


# Numbers and normalisation.


def _gemm(node: Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a, b = a.t() if node.get("transA", 0) else a, b.t() if node.get("transB", 0) else b
    alpha = node.get("alpha", 1.0)
    return alpha * (a @ b) if c is None else torch.addmm(c, a, b, beta=node.get("beta", 1.0), alpha=alpha)


def _div(node: Node, a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _mod(node: Node, a: Tensor, b: Tensor) -> Tensor:
    return torch.fmod(a, b) if node.get("fmod", 0) else torch.remainder(a, b)


def _softmax(node: Node, x: Tensor) -> Tensor:
    run: Callable[..., Tensor] = torch.softmax if node.op == "Softmax" else torch.log_softmax
    if node.opset >= 13:
        return run(x, node.get("axis", -1))
    return run(_flatten(node, x), 1).reshape(x.shape)  # over all axes from `axis` on


def _clip(node: Node, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    bottom = node.get("min") if low is None else low
    top = node.get("max") if high is None else high
    return x if bottom is None and top is None else torch.clamp(x, bottom, top)


def _batch_norm(node: Node, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return F.batch_norm(x, mean, var, scale, bias, eps=node.get("epsilon", 1e-5))


def _layer_norm(node: Node, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    axes = x.shape[node.get("axis", -1) :]
    out = F.layer_norm(x, axes, eps=node.get("epsilon", 1e-5)) * scale
    return out if bias is None else out + bias


def _rms_norm(node: Node, x: Tensor, scale: Tensor) -> Tensor:
    axes = list(range(node.get("axis", -1) % x.dim(), x.dim()))
    epsilon: float = node.get("epsilon", 1e-5)
    return x * torch.rsqrt(x.square().mean(axes, keepdim=True) + epsilon) * scale


def _group_norm(node: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups = node.get("num_groups", x.shape[1])  # an instance norm has a group for each channel
    if len(scale) != x.shape[1]:  # a group norm before opset 21
        scale, bias = (t.repeat_interleave(x.shape[1] // groups) for t in (scale, bias))
    return F.group_norm(x, groups, scale, bias, node.get("epsilon", 1e-5))


def _reduce(run: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[..., Tensor]:
    def reduced(node: Node, x: Tensor, given: Tensor | None = None) -> Tensor:
        axes = node.ints("axes", given)
        if not axes and node.get("noop_with_empty_axes", 0):
            return x
        return run(x, axes or list(range(x.dim())), bool(node.get("keepdims", 1)))

    return reduced


def _arg_best(node: Node, x: Tensor) -> Tensor:
    axis, keep = node.get("axis", 0), bool(node.get("keepdims", 1))
    run: Callable[..., Tensor] = torch.argmax if node.op == "ArgMax" else torch.argmin
    if node.get("select_last_index", 0):
        last: int = x.shape[axis] - 1
        return last - run(x.flip(axis), axis, keep)
    return run(x, axis, keep)


def _dropout(node: Node, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None) -> Result:
    if training is not None and bool(training):
        raise ModelError("expected a graph for inference, got a Dropout in training mode; export after net.eval()")
    return (x, torch.ones_like(x, dtype=torch.bool))[: node.outputs]


# Shapes.


def _flatten(node: Node, x: Tensor) -> Tensor:
    axis = node.get("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _reshape(node: Node, x: Tensor, shape: Tensor) -> Tensor:
    wanted = shape.tolist()
    if not node.get("allowzero", 0):
        wanted = [size or x.shape[axis] for axis, size in enumerate(wanted)]
    return x.reshape(wanted)


def _transpose(node: Node, x: Tensor) -> Tensor:
    return x.permute(node.get("perm", list(range(x.dim()))[::-1]))


def _split(node: Node, x: Tensor, given: Tensor | None = None) -> Result:
    axis, sizes = node.get("axis", 0), node.ints("split", given)
    found: Sequence[Tensor] = torch.split(x, -(-x.shape[axis] // node.outputs) if sizes is None else sizes, axis)
    return found


def _slice(
    node: Node,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    first, last = node.ints("starts", starts) or [], node.ints("ends", ends) or []
    along = node.ints("axes", axes) or list(range(len(first)))
    by = [1] * len(first) if steps is None else steps.tolist()
    for start, end, axis, step in zip(first, last, along, by, strict=True):
        cells = range(*slice(start, end, step).indices(x.shape[axis]))
        if step == 1:
            x = x.narrow(axis, min(cells.start, x.shape[axis]), len(cells))
        else:
            x = x.index_select(axis, torch.tensor(cells, dtype=torch.int64, device=x.device))
    return x


def _gather(node: Node, x: Tensor, index: Tensor) -> Tensor:
    axis = node.get("axis", 0) % x.dim()
    index = torch.where(index < 0, index + x.shape[axis], index).to(torch.int64)
    taken = x.index_select(axis, index.flatten())
    return taken.reshape([*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])


def _pad_any(
    node: Node, x: Tensor, given: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    pads = node.ints("pads", given) or []
    along = list(range(x.dim())) if axes is None else [axis % x.dim() for axis in axes.tolist()]
    pairs = [(0, 0)] * x.dim()
    for place, axis in enumerate(along):
        pairs[axis] = (pads[place], pads[place + len(along)])
    mode = node.get("mode", "constant")
    if mode == "constant":
        return pad(x, pairs, node.get("value", 0.0) if value is None else value.item())
    for axis, (before, after) in enumerate(pairs):
        if before or after:
            size = x.shape[axis]
            cells = torch.arange(-before, size + after, device=x.device)
            if mode == "reflect":
                cells = (size - 1) - (cells.remainder(max(1, 2 * size - 2)) - (size - 1)).abs()
            x = x.index_select(axis, cells.clamp(0, size - 1) if mode == "edge" else cells.remainder(size))
    return x


def _blocks(node: Node, x: Tensor) -> Tensor:
    """DepthToSpace and SpaceToDepth: channels become pixels, or pixels channels."""
    n, c, h, w = x.shape
    b = node.get("blocksize")
    if node.op == "SpaceToDepth":
        return x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b * b, h // b, w // b)
    if node.get("mode", "DCR") == "DCR":
        x = x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        x = x.reshape(n, c // b**2, b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(n, c // b**2, h * b, w * b)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    if a.dim() == 2 and b.dim() == 3 and b.shape[2] == 1:  # a matrix times columns, one a row: without a batch of it
        return F.linear(b.flatten(1), a).reshape(len(b), -1, 1)
    return torch.matmul(a, b)


def _squeeze(node: Node, x: Tensor, given: Tensor | None = None) -> Tensor:
    axes = node.ints("axes", given)
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def _unsqueeze(node: Node, x: Tensor, given: Tensor | None = None) -> Tensor:
    axes = node.ints("axes", given) or []
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _shape(node: Node, x: Tensor) -> Tensor:
    return torch.tensor(x.shape[node.get("start", 0) : node.get("end")], dtype=torch.int64, device=x.device)


def _constant_of_shape(node: Node, shape: Tensor) -> Tensor:
    value = node.get("value", torch.zeros(1))
    return torch.full(shape.tolist(), value.item(), dtype=value.dtype, device=shape.device)


def _expand(node: Node, x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(np.broadcast_shapes(x.shape, shape.tolist()))


def _range(node: Node, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype, device=start.device)


# The table.


def _plain(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda node, *inputs: run(*inputs)


def _all(run: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda node, *inputs: reduce(run, inputs)


_PLAIN: dict[str, Callable[..., Tensor]] = {
    "Abs": torch.abs, "Add": torch.add, "And": torch.logical_and, "Ceil": torch.ceil,
    "Cos": torch.cos, "Equal": torch.eq,
    "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor, "Greater": torch.gt, "GreaterOrEqual": torch.ge,
    "HardSwish": F.hardswish, "Identity": lambda x: x, "Less": torch.lt, "LessOrEqual": torch.le, "Log": torch.log,
    "MatMul": _matmul, "Mish": F.mish, "Mul": torch.mul, "Neg": torch.neg, "Not": torch.logical_not,
    "Or": torch.logical_or, "PRelu": lambda x, slope: torch.where(x > 0, x, slope * x),
    "Pow": lambda x, power: torch.pow(x, power).to(x.dtype), "Reciprocal": torch.reciprocal, "Relu": F.relu,
    "Round": torch.round, "Sin": torch.sin,
    "Sigmoid": torch.sigmoid, "Sign": torch.sign, "Softplus": F.softplus, "Softsign": F.softsign, "Sqrt": torch.sqrt,
    "Sub": torch.sub, "Tanh": torch.tanh, "Tile": lambda x, times: x.repeat(times.tolist()),
    "Where": torch.where,
}  # fmt: skip

OPERATORS: dict[str, Callable[..., Result]] = {name: _plain(run) for name, run in _PLAIN.items()} | {
    "ArgMax": _arg_best,
    "ArgMin": _arg_best,
    "AveragePool": average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": lambda node, x: x.to(DTYPES[node.get("to")]),
    "Clip": _clip,
    "Concat": lambda node, *inputs: torch.cat(inputs, node.get("axis")),
    "ConstantOfShape": _constant_of_shape,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "DepthToSpace": _blocks,
    "Div": _div,
    "Dropout": _dropout,
    "Einsum": lambda node, *inputs: torch.einsum(node.get("equation"), *inputs),
    "Celu": lambda node, x: F.celu(x, node.get("alpha", 1.0)),
    "Elu": lambda node, x: F.elu(x, node.get("alpha", 1.0)),
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Gelu": lambda node, x: F.gelu(x, approximate=node.get("approximate", "none")),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda node, x: x.mean(list(range(2, x.dim())), keepdim=True),
    "GlobalMaxPool": lambda node, x: x.amax(list(range(2, x.dim())), keepdim=True),
    "GroupNormalization": _group_norm,
    "HardSigmoid": lambda node, x: (node.get("alpha", 0.2) * x + node.get("beta", 0.5)).clamp(0, 1),
    "InstanceNormalization": _group_norm,
    "LRN": lambda node, x: F.local_response_norm(
        x, node.get("size"), node.get("alpha", 1e-4), node.get("beta", 0.75), node.get("bias", 1.0)
    ),
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda node, x: F.leaky_relu(x, node.get("alpha", 0.01)),
    "LogSoftmax": _softmax,
    "Max": _all(torch.maximum),
    "MaxPool": max_pool,
    "Min": _all(torch.minimum),
    "Mod": _mod,
    "Pad": _pad_any,
    "Range": _range,
    "RMSNormalization": _rms_norm,
    "ReduceL1": _reduce(lambda x, axes, keep: x.abs().sum(axes, keep)),
    "ReduceL2": _reduce(lambda x, axes, keep: x.square().sum(axes, keep).sqrt()),
    "ReduceLogSumExp": _reduce(lambda x, axes, keep: x.logsumexp(axes, keep)),
    "ReduceMax": _reduce(lambda x, axes, keep: x.amax(axes, keep)),
    "ReduceMean": _reduce(lambda x, axes, keep: x.mean(axes, keep)),
    "ReduceMin": _reduce(lambda x, axes, keep: x.amin(axes, keep)),
    "ReduceProd": _reduce(
        lambda x, axes, keep: (
            reduce(lambda t, axis: t.prod(axis, True), axes, x)
            if keep
            else x.movedim(axes, tuple(range(len(axes)))).flatten(0, len(axes) - 1).prod(0)
        )
    ),
    "ReduceSum": _reduce(lambda x, axes, keep: x.sum(axes, keep)),
    "ReduceSumSquare": _reduce(lambda x, axes, keep: x.square().sum(axes, keep)),
    "Reshape": _reshape,
    "Resize": resize,
    "Selu": lambda node, x: node.get("gamma", 1.0507009873554805) * F.elu(x, node.get("alpha", 1.6732632423543772)),
    "Shape": _shape,
    "Slice": _slice,
    "Softmax": _softmax,
    "SpaceToDepth": _blocks,
    "Split": _split,
    "Squeeze": _squeeze,
    "Sum": _all(torch.add),
    "Swish": lambda node, x: x * torch.sigmoid(node.get("alpha", 1.0) * x),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Upsample": resize,
}
