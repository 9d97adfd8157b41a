"""An ONNX file as a model to be queried: through torch with gradients, or through ONNX Runtime with scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparring.core.errors import ModelError
from sparring.core.model import Access, Prediction
from sparring.models.onnx_file import Source, need, read
from sparring.models.onnx_ops import OPERATORS, Result, lacking
from sparring.models.onnx_pixels import Node
from sparring.models.torch import TorchModel


def open_onnx(
    path: str | Path,
    *,
    gradients: bool = True,
    bounds: tuple[float, float] = (0.0, 1.0),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    probabilities: bool = False,
    device: str = "cpu",
) -> TorchModel | OnnxRuntimeModel:
    """The classifier stored at `path`, for images (n, c, h, w) within `bounds`.

    With `gradients` its graph is carried out by torch on `device`; without, by ONNX Runtime on the CPU, which
    knows every operator. A softmax at the end of the graph is dropped, so that the answers are logits, and
    `probabilities` only matters to what else answers probabilities. `mean` and `std` are those of `TorchModel`.
    """
    if not gradients:
        return OnnxRuntimeModel(path, bounds=bounds, mean=mean, std=std, probabilities=probabilities)
    graph = OnnxGraph(read(path))
    soft = probabilities and not graph.source.softmax
    return TorchModel(graph.to(device), bounds=bounds, mean=mean, std=std, probabilities=soft)


class OnnxRuntimeModel:
    """The classifier stored at `path`, carried out by ONNX Runtime on the CPU: labels and logits."""

    access = Access.SCORE

    def __init__(
        self,
        path: str | Path,
        *,
        bounds: tuple[float, float] = (0.0, 1.0),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        probabilities: bool = False,
    ) -> None:
        self.bounds, source = bounds, read(path)
        self._session = session(source)
        self._source = replace(source, proto=None)
        soft = probabilities and not source.softmax
        self._model = TorchModel(self._answer, bounds=bounds, mean=mean, std=std, probabilities=soft)

    def query(self, x: Tensor, access: Access) -> Prediction:
        """Answer for images `x` (n, c, h, w) with labels or logits."""
        if access > self.access:
            raise ModelError(
                "expected a query for labels or scores, got one for gradients, which ONNX Runtime has not; "
                "open the file with gradients=True"
            )
        return self._model.query(x, access)

    def _answer(self, x: Tensor) -> Tensor:
        inputs = self._source.arrange(x.cpu())
        parts = [torch.from_numpy(self._session.run(None, {self._source.input: p.numpy()})[0]) for p in inputs]
        return self._source.join(parts, len(x)).to(x.device)


def session(source: Source) -> Any:
    """The graph of `source` in ONNX Runtime on the CPU, on as many threads as torch has."""
    runtime = need("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only: they are raised as well
    try:
        stored = source.proto.SerializeToString()
        return runtime.InferenceSession(stored, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ModelError(f"{source.path}: ONNX Runtime cannot open it: {error}") from error


class OnnxGraph(nn.Module):
    """A graph as torch operations, carried out node by node; its constants are buffers."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.source = source
        self._held: dict[str, str] = {}  # constant -> buffer
        self._steps = self._plan()
        self.source = replace(source, proto=None)  # it holds every weight once more
        self.eval()
        self._at_once = source.batch is not None and self._splits()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes) of images `x` (n, c, h, w)."""
        pieces = self.source.arrange(x)
        if self._at_once and len(pieces) > 1:
            parts = torch.vmap(self.carry_out)(torch.stack(pieces)).unbind()
        else:
            parts = tuple(self.carry_out(piece) for piece in pieces)
        return self.source.join(parts, len(x))

    def _plan(self) -> list[_Step]:
        """The nodes in their order, less those that need no image: their values are held with the constants."""
        known, nodes = self._nodes()
        found = []
        for raw, run in nodes:
            if all(name in known for name in raw.input):
                try:
                    known.update(_named(raw.output, run(*(known[name] for name in raw.input))))
                    continue
                except Exception:
                    pass  # it is tried again with the images, where the fault is named
            found.append((raw, run))
        last = {name: place for place, (raw, _) in enumerate(found) for name in raw.input}
        last[self.source.output] = len(found)
        for name, value in known.items():
            if value is not None and name in last:
                self._held[name] = f"constant_{len(self._held)}"
                self.register_buffer(self._held[name], value)
        over: list[list[str]] = [[] for _ in range(len(found) + 1)]
        for name, place in last.items():
            if name and name not in known:
                over[place].append(name)
        return [
            _Step(f"{raw.op_type} {raw.name}".strip(), run, tuple(raw.input), tuple(raw.output), tuple(over[place]))
            for place, (raw, run) in enumerate(found)
        ]

    def _nodes(self) -> tuple[dict[str, Tensor | None], list[tuple[Any, Callable[..., Result]]]]:
        """The constants by name (none has no name), and the other nodes with their operators."""
        graph = self.source.proto.graph
        known: dict[str, Tensor | None] = {constant.name: _tensor(constant) for constant in graph.initializer}
        known[""] = None
        nodes: list[tuple[Any, Callable[..., Result]]] = []
        missing = {"sparse constants"} if graph.sparse_initializer else set()
        for raw in graph.node:
            if raw.domain not in ("", "ai.onnx"):
                missing.add(f"{raw.domain}.{raw.op_type}")
            elif raw.op_type == "Constant":
                known[raw.output[0]] = _constant(raw)
                if known[raw.output[0]] is None:
                    missing.add(f"Constant with {raw.attribute[0].name}")
            else:
                outputs = max(place + 1 for place, name in enumerate(raw.output) if name)
                node = Node(raw.op_type, {a.name: _attribute(a) for a in raw.attribute}, self.source.opset, outputs)
                lacks = lacking(node)
                if lacks:
                    missing.add(lacks)
                else:
                    nodes.append((raw, partial(OPERATORS[node.op], node)))
        if missing:
            raise ModelError(
                f"{self.source.path}: no gradients through {', '.join(sorted(missing))}; open it with "
                f"gradients=False: ONNX Runtime then answers label- and score-based attacks"
            )
        return known, nodes

    def carry_out(self, x: Tensor) -> Tensor:
        """The output for an input `x` as the graph wants it."""
        buffers = dict(self.named_buffers())
        values: dict[str, Tensor | None] = {name: buffers[held] for name, held in self._held.items()}
        values |= {"": None, self.source.input: x}
        for step in self._steps:
            try:
                made = step.run(*(values[name] for name in step.inputs))
            except (torch.OutOfMemoryError, ModelError):
                raise
            except Exception as error:
                raise RuntimeError(f"node {step.name}: {error}") from error
            values.update(_named(step.outputs, made))
            for name in step.over:
                values.pop(name)
        logits = values[self.source.output]
        if logits is None:
            raise ModelError(f"{self.source.path}: expected logits, got nothing from {self.source.output!r}")
        return logits

    def _splits(self) -> bool:
        """Can several batches of the size that the graph insists on be carried out at once, with the same answers?"""
        shape = self.source.shape
        if shape is None or None in shape:
            return False
        sizes = [size for size in shape if size is not None]
        count = 2 * torch.Size(sizes).numel()
        x = (torch.arange(count) * 0.618 % 1).to(self.source.dtype).view(2, *sizes).requires_grad_()
        try:
            together, apart = torch.vmap(self.carry_out)(x), torch.stack([self.carry_out(piece) for piece in x])
            slopes = [torch.autograd.grad(out.float().square().sum(), x)[0] for out in (together, apart)]
        except Exception:
            return False  # then piece by piece, where a real fault comes out
        return _near(together.detach(), apart.detach(), 1e-3) and _near(slopes[0], slopes[1], 0.1)


@dataclass(frozen=True)
class _Step:
    name: str
    run: Callable[..., Result]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    over: tuple[str, ...]  # what nobody needs any more


def _named(names: Sequence[str], made: Result) -> dict[str, Tensor]:
    pairs = zip(names, (made,) if isinstance(made, Tensor) else made, strict=False)
    return {name: value for name, value in pairs if name}  # what has no name is not wanted


def _tensor(constant: Any) -> Tensor:
    try:
        return torch.from_numpy(np.array(need("onnx.numpy_helper").to_array(constant)))
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"expected constants of numbers, got {constant.name!r} of type {constant.data_type}: {error}; "
            f"open the file with gradients=False"
        ) from error


def _attribute(raw: Any) -> Any:
    value = need("onnx.helper").get_attribute_value(raw)
    if isinstance(value, bytes):
        return value.decode()
    if type(value).__name__ == "TensorProto":
        return _tensor(value)
    return list(value) if isinstance(value, Sequence) else value


def _constant(node: Any) -> Tensor | None:
    """The value of a Constant node; `None` for strings and sparse tensors."""
    name, value = node.attribute[0].name, _attribute(node.attribute[0])
    if name == "value":
        return value if isinstance(value, Tensor) else None
    kinds = {"value_float": torch.float32, "value_floats": torch.float32, "value_int": torch.int64}
    kinds["value_ints"] = torch.int64
    return torch.tensor(value, dtype=kinds[name]) if name in kinds else None


def _near(one: Tensor, two: Tensor, share: float) -> bool:
    return one.shape == two.shape and bool((one - two).abs().max() <= share * two.abs().max())


def adapt(source: object, **options: Any) -> TorchModel | OnnxRuntimeModel | None:
    """The path of a .onnx file; see `sparring.wrap`."""
    return open_onnx(source, **options) if isinstance(source, str | Path) and str(source).endswith(".onnx") else None
