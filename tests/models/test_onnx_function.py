"""ONNX files as functions of any numbers: the order and the shapes of the file, and ONNX Runtime's own answers."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from onnx import helper, numpy_helper  # noqa: E402

from sparring.certificates.graph import trace  # noqa: E402
from sparring.core.errors import ModelError, UsageError  # noqa: E402
from sparring.models.onnx_function import open_function  # noqa: E402

DRAW = np.random.default_rng(0)
W = DRAW.normal(size=(12, 4)).astype(np.float32)


def stored(path, nodes, shape, held, out="y"):
    ends = [helper.make_tensor_value_info("x", 1, shape)], [helper.make_tensor_value_info(out, 1, None)]
    given = [numpy_helper.from_array(np.asarray(value), name) for name, value in held.items()]
    graph = helper.make_graph([helper.make_node(*node[:3], **node[3]) for node in nodes], "g", *ends, given)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


DENSE = [("MatMul", ["f", "w"], ["m"], {}), ("Relu", ["m"], ["y"], {})]
FLAT = ("Flatten", ["x"], ["f"], {"axis": 1})
ROW = ("Reshape", ["x", "s"], ["f"], {})
CASES = {
    "flat": ([("Identity", ["x"], ["f"], {}), *DENSE], [1, 12], {}),
    "acas": ([("Sub", ["x", "c"], ["d"], {}), ("Flatten", ["d"], ["f"], {}), *DENSE], [1, 1, 1, 12],
             {"c": np.full((1, 1, 1, 12), 0.25, np.float32)}),
    "open rows": ([FLAT, *DENSE], [None, 3, 2, 2], {}),
    "channels last": ([FLAT, *DENSE], [1, 2, 2, 3], {}),
    "reshaped to one row": ([ROW, *DENSE], [1, 3, 2, 2], {"s": np.array([1, -1])}),
    "reshaped to all sizes": ([ROW, *DENSE], [1, 2, 6], {"s": np.array([1, 12])}),
    "a column without rows": ([("MatMul", ["wt", "x"], ["m"], {}), ("Relu", ["m"], ["y"], {})], [12, 1], {"wt": W.T}),
    "numbers without rows": ([("MatMul", ["x", "w"], ["m"], {}), ("Relu", ["m"], ["y"], {})], [12], {}),
    "convolution": ([("Conv", ["x", "k"], ["a"], {"pads": [1] * 4}), ("Relu", ["a"], ["b"], {}),
                     ("Reshape", ["b", "s"], ["f"], {}), *DENSE], [1, 1, 2, 3],
                    {"k": DRAW.normal(size=(2, 1, 3, 3)).astype(np.float32), "s": np.array([1, -1])}),
}  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", CASES)
def test_it_answers_as_onnx_runtime_does_number_by_number(kind, packed, tmp_path):
    nodes, shape, held = CASES[kind]
    path = stored(tmp_path / "net.onnx", nodes, shape, {"w": W, **held})
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    if packed:
        path = tmp_path / "net.onnx.gz"
        path.write_bytes(gzip.compress((tmp_path / "net.onnx").read_bytes()))
    function = open_function(path)
    assert function.inputs == np.prod([size or 1 for size in shape])
    assert function.outputs == 4
    flat = torch.randn(5, function.inputs, generator=torch.Generator().manual_seed(1))
    x = flat.view(5, *function.shape)
    wanted = np.stack([session.run(None, {"x": row.reshape([s or 1 for s in shape])})[0] for row in flat.numpy()])
    ran = function.run(x.double())
    np.testing.assert_array_equal(ran.numpy(), wanted.reshape(5, -1))
    found = trace(function, function.shape).graph().forward(x.double())
    torch.testing.assert_close(found, ran, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("nodes", "shape", "message"),
    [
        ([("ReduceSum", ["x"], ["y"], {"keepdims": 1})], [None, 3], "expected one answer a row"),
        ([("Softmax", ["x"], ["y"], {"axis": 0})], [None, 3], "answers otherwise for several rows"),
        ([("Hardmax", ["x"], ["y"], {})], [1, 3], "no proof through Hardmax"),
        ([("Relu", ["x"], ["y"], {})], [1, None], "fixed sizes"),
    ],
)
def test_what_is_no_function_of_rows_is_refused(nodes, shape, message, tmp_path):
    with pytest.raises(ModelError, match=message):
        open_function(stored(tmp_path / "net.onnx", nodes, shape, {}))


def test_no_file_or_no_model(tmp_path):
    with pytest.raises(UsageError, match="found no file"):
        open_function(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx.gz").write_bytes(b"not packed")
    with pytest.raises(ModelError, match="damaged"):
        open_function(tmp_path / "bad.onnx.gz")
