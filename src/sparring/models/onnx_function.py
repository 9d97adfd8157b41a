"""An ONNX file as a function of any numbers, images or not: by torch to be bounded, by ONNX Runtime to be sure."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparring.core.errors import ModelError
from sparring.core.model import Access, Prediction
from sparring.models.onnx import OnnxGraph, session
from sparring.models.onnx_file import need, read_any


class OnnxFunction:
    """The network stored at `path`, from (n, *shape) to (n, outputs), both in the order of the file.

    A first axis of size 1 or of an open size is that of the rows; without one, the whole input is a row. Nothing at
    the end of the graph is dropped. `ModelError` for operators that torch does not carry out here, and where ONNX
    Runtime answers otherwise than torch does for several rows at once.
    """

    access = Access.SCORE
    bounds = (0.0, 1.0)

    def __init__(self, path: str | Path) -> None:
        source = read_any(path)
        if source.shape is None or None in source.shape[1:]:
            raise ModelError(f"{path}: expected an input of fixed sizes, got {source.shape}; fix them in the file")
        first, *others = source.shape or (None,)
        self._rows = first in (1, None)
        self.shape: tuple[int, ...] = tuple(s for s in (others if self._rows else source.shape) if s is not None)
        self._path, self._dtype, self._input = str(path), source.dtype, source.input
        self._session = session(source)
        if self._rows:
            _free_rows(source.proto)
        try:
            self._graph = OnnxGraph(replace(source, shape=None))
        except ModelError as error:  # what it advises does not help here
            raise ModelError(str(error).partition("; open it")[0].replace("gradients", "proof")) from error
        self.outputs = self._agree()

    @property
    def inputs(self) -> int:
        """How many numbers a row has."""
        return math.prod(self.shape)

    def query(self, x: Tensor, access: Access) -> Prediction:
        """The outputs of `x` (n, *shape), as logits."""
        if access > self.access:
            raise ModelError("expected a query for scores, got one for gradients; its trace has them")
        found = self._graph.carry_out(x.to(self._dtype))
        if found.shape[:1] != x.shape[:1]:
            raise ModelError(f"{self._path}: expected one answer a row, got {tuple(found.shape)} for {len(x)} rows")
        logits = found.flatten(1)
        return Prediction(logits.argmax(1), logits)

    def run(self, x: Tensor) -> Tensor:
        """What ONNX Runtime answers for `x` (n, *shape), rounded to the type of the graph: (n, outputs) float64."""
        rows: Any = x.detach().cpu().to(self._dtype).numpy()
        fed = [row[np.newaxis] if self._rows else row for row in rows]
        found = [self._session.run(None, {self._input: row})[0] for row in fed]
        return torch.from_numpy(np.stack(found)).double().flatten(1)

    def _agree(self) -> int:
        """The number of outputs, once torch and ONNX Runtime are seen to answer alike."""
        size = 3 * self.inputs
        x = (torch.arange(size) * 0.618034 % 1).view(3, *self.shape)
        try:
            theirs = self.run(x)
        except Exception as error:
            raise ModelError(f"{self._path}: ONNX Runtime cannot carry it out: {error}") from error
        try:
            with torch.no_grad():
                ours = self.query(x, Access.SCORE).logits
        except RuntimeError as error:
            raise ModelError(
                f"{self._path}: no proof: torch cannot carry out several rows at once: {error}"
            ) from error
        scale = 1e-3 * (1 + float(theirs.abs().max()))
        if ours is None or ours.shape != theirs.shape or not torch.allclose(ours.double(), theirs, 0, scale):
            raise ModelError(
                f"{self._path}: no proof: it answers otherwise for several rows at once; does it mix them?"
            )
        return theirs.shape[1]


def _free_rows(proto: Any) -> None:
    """Let reshapes to one row, [1, ...], serve any number of rows, [0, ...]: as many as came."""
    onnx = need("onnx")
    targets = {node.input[1] for node in proto.graph.node if node.op_type == "Reshape"}
    held = [tensor for tensor in proto.graph.initializer if tensor.name in targets]
    for node in proto.graph.node:
        if node.op_type == "Constant" and node.output[0] in targets:
            held += [attribute.t for attribute in node.attribute if attribute.name == "value"]
    for tensor in held:
        wanted = onnx.numpy_helper.to_array(tensor)
        if wanted.ndim == 1 and len(wanted) and wanted[0] == 1:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.concatenate([[0], wanted[1:]]), tensor.name))


def open_function(path: str | Path) -> OnnxFunction:
    """The network stored at `path`, a .onnx or .onnx.gz file."""
    return OnnxFunction(path)
