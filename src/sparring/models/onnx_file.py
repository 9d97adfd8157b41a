"""What an ONNX file holds: its graph, and what that takes and answers."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparring.core.errors import ModelError, UsageError
from sparring.core.files import unzipped
from sparring.models.onnx_ops import DTYPES

_OLDEST = 7  # before it, operators broadcast by other rules
_FLOATS = (torch.float32, torch.float16, torch.float64)
_CUT = "export the classifier alone, or cut it out with onnx.utils.extract_model"


@dataclass(frozen=True)
class Source:
    """What a file holds: a graph from one batch of images to one batch of logits."""

    path: str
    proto: Any  # onnx.ModelProto, without a softmax at its end; None once it is understood
    opset: int  # the version of the standard operators
    input: str
    output: str
    dtype: torch.dtype
    shape: tuple[int | None, ...] | None  # of the input, as the graph declares it
    softmax: bool  # one was dropped

    @property
    def batch(self) -> int | None:
        """The only number of images that the graph takes at once, if it insists on one."""
        return None if self.shape is None else self.shape[0]

    @property
    def channels_last(self) -> bool:
        """Does the graph want images (n, h, w, c)? Read off its sizes."""
        return self.shape is not None and self.shape[3] in (1, 3) and self.shape[1] not in (1, 3)

    @property
    def asked(self) -> tuple[int | None, ...]:
        """The sizes (n, c, h, w) of the images that it serves; any n."""
        _, *sizes = self.shape or (None,) * 4
        return (None, sizes[2], *sizes[:2]) if self.channels_last else (None, *sizes)

    def join(self, parts: Sequence[Tensor], rows: int) -> Tensor:
        """The answers to the first `rows` images, as logits (n, classes) if they were (n, classes, 1, ...)."""
        whole = torch.cat(list(parts))[:rows]
        return whole.flatten(1) if set(whole.shape[2:]) == {1} else whole

    def arrange(self, x: Tensor) -> list[Tensor]:
        """Images (n, c, h, w) as the graph wants them; where it insists on a batch, filled up with the last one."""
        asked = self.asked
        if any(size not in (None, came) for size, came in zip(asked[1:], x.shape[1:], strict=True)):
            raise ModelError(f"{self.path}: expected images {_told(asked)}, got {tuple(x.shape)}; resize them")
        x = (x.permute(0, 2, 3, 1) if self.channels_last else x).to(self.dtype).contiguous()
        if self.batch is None:
            return [x]
        spare = -len(x) % self.batch
        return list(torch.cat([x, x[-1:].expand(spare, *x.shape[1:])]).chunk((len(x) + spare) // self.batch))


def read(path: str | Path) -> Source:
    """The graph stored at `path`, checked to be a classifier of images."""
    source = read_any(path, "input, images (n, c, h, w)", "output, logits (n, classes)")
    graph = source.proto.graph
    if source.shape is not None and len(source.shape) != 4:
        raise ModelError(f"{path}: expected an input (n, c, h, w), got {_told(source.shape)}; export it for images")
    _, out = _declared(graph.output[0])
    if out is not None and (len(out) < 2 or set(out[2:]) - {1}):
        raise ModelError(f"{path}: expected logits (n, classes), got {_told(out)}; flatten them in the graph")
    softmax = _drop_softmax(graph, source.opset, 2 if out is None else len(out))
    return replace(source, output=graph.output[0].name, softmax=softmax)


def read_any(path: str | Path, comes: str = "input", goes: str = "output") -> Source:
    """The graph stored at `path` (.onnx, or .gz of it): one input of floats and one output, of whatever shapes."""
    if not Path(path).is_file():
        raise UsageError(f"expected an ONNX file, found no file {path}")
    proto = _load(path)
    graph = proto.graph
    constants = {constant.name for constant in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    _one(path, comes, inputs)
    _one(path, goes, list(graph.output))
    dtype, shape = _declared(inputs[0])
    if dtype not in _FLOATS:
        raise ModelError(f"{path}: expected an input of floats, got {dtype}; put the conversion outside the graph")
    opset = max((int(o.version) for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=_OLDEST)
    if opset < _OLDEST:
        raise ModelError(
            f"{path}: expected opset {_OLDEST} or later, got {opset}; "
            f"convert it with onnx.version_converter.convert_version"
        )
    return Source(str(path), proto, opset, inputs[0].name, graph.output[0].name, dtype, shape, False)


def _load(path: str | Path) -> Any:
    """The checked onnx.ModelProto at `path`; unlike the checker, allow inputs and outputs without sizes."""
    onnx = need("onnx")
    try:
        packed = Path(path).suffix == ".gz"
        proto = onnx.load_from_string(unzipped(Path(path))) if packed else onnx.load(str(path), format="protobuf")
        ends = [value.type for value in (*proto.graph.input, *proto.graph.output)]
        bare = [t.tensor_type for t in ends if t.HasField("tensor_type") and not t.tensor_type.HasField("shape")]
        for kind in bare:
            kind.shape.SetInParent()
        onnx.checker.check_model(proto)
        for kind in bare:
            kind.ClearField("shape")
        return need("onnx.inliner").inline_local_functions(proto) if proto.functions else proto
    except UsageError:
        raise
    except Exception as error:
        raise ModelError(f"{path}: expected an ONNX model, got another kind or a damaged file: {error}") from error


def _drop_softmax(graph: Any, opset: int, rank: int) -> bool:
    """Make the logits before a softmax over the classes the output of `graph`; was there one?"""
    makers = {name: node for node in graph.node for name in node.output}
    name, ends = graph.output[0].name, []
    while name in makers and makers[name].op_type in ("Identity", "Softmax", "LogSoftmax"):
        ends.append(makers[name])
        name = ends[-1].input[0]
        if ends[-1].op_type != "Identity":
            break
    if name not in makers or not ends or ends[-1].op_type == "Identity":
        return False
    axis = next((a.i for a in ends[-1].attribute if a.name == "axis"), 1 if opset < 13 else -1)
    gone = [node.output[0] for node in ends]
    kept = [node for node in graph.node if node.output[0] not in gone]
    if axis % rank != 1 or any(used in gone for node in kept for used in node.input):
        return False  # not over the classes, or more than an end
    del graph.node[:]
    graph.node.extend(kept)
    graph.output[0].name = name
    return True


def need(package: str) -> Any:
    """The optional `package`."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UsageError(f"an ONNX model needs the package {package}; pip install 'sparring[onnx]'") from error


def _one(path: str | Path, what: str, values: list[Any]) -> None:
    if len(values) != 1:
        names = ", ".join(value.name for value in values) or "none"
        raise ModelError(f"{path}: expected one {what}, got {len(values)} ({names}); {_CUT}")


def _declared(value: Any) -> tuple[torch.dtype | None, tuple[int | None, ...] | None]:
    """Type and sizes of an input or output; an open size is `None`."""
    kind = value.type.tensor_type
    sizes = tuple(int(d.dim_value) if d.dim_value > 0 else None for d in kind.shape.dim)
    return DTYPES.get(kind.elem_type), sizes if kind.HasField("shape") else None


def _told(shape: Sequence[int | None]) -> str:
    return "(" + ", ".join("?" if size is None else str(size) for size in shape) + ")"
