"""ONNX files answer as ONNX Runtime does, and their gradients are those of the network that was exported."""

from __future__ import annotations

import subprocess
import sys
import warnings
import weakref
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from sparring.attacks.pgd import PGD  # noqa: E402
from sparring.attacks.square import Square  # noqa: E402
from sparring.core.errors import ModelError, UsageError  # noqa: E402
from sparring.core.model import Access  # noqa: E402
from sparring.core.threat import Linf  # noqa: E402
from sparring.engine.loop import run  # noqa: E402
from sparring.models.onnx import OnnxGraph, open_onnx, read  # noqa: E402
from sparring.models.torch import TorchModel  # noqa: E402


def noise(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def images(rows=4, channels=3, size=8):
    return torch.rand(rows, channels, size, size, generator=torch.Generator().manual_seed(0))


def store(path, nodes, shape, out=("n", "k"), *, opset=17, dtype=TensorProto.FLOAT, outputs=("y",), **constants):
    """A graph from `x` to `y` on disk; `constants` are its other inputs."""
    held = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, out) for name in outputs],
        held,
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("own", 1)]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString())
    return path


def runtime(path, x):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: np.asarray(x)})[0])


def case(op, *inputs, opset=17, shape=(3, 8, 8), outputs=1, name="", **attributes):
    """One operator over `x` (2, *shape); `inputs` are further constants, `None` where one is left out."""
    marks = [op, f"opset{opset}", name, *(f"{k}={v}" for k, v in attributes.items() if not isinstance(v, np.ndarray))]
    return pytest.param(op, inputs, opset, shape, outputs, attributes, id="-".join(m for m in marks if m)[:80])


def i64(*values):
    return np.array(values, np.int64)


def f32(value):
    return np.array(value, np.float32)


W, V = noise(4, 3, 3, 3), noise(4, 8)
CASES = [
    case("Conv", W, pads=[1, 1, 1, 1]),
    case("Conv", W, noise(4), strides=[2, 2], pads=[0, 1, 2, 1]),
    case("Conv", W, dilations=[2, 2]),
    case("Conv", noise(6, 1, 3, 3), group=3),
    case("Conv", W, auto_pad="SAME_UPPER", strides=[2, 2]),
    case("Conv", W, auto_pad="SAME_LOWER", strides=[2, 2]),
    case("Conv", W, auto_pad="VALID"),
    case("Conv", noise(4, 3, 3), noise(4), shape=(3, 9), pads=[1, 0]),
    case("ConvTranspose", noise(3, 4, 3, 3), noise(4), strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]),
    case("ConvTranspose", noise(3, 2, 3, 3), group=3, strides=[2, 2], pads=[0, 1, 2, 1], dilations=[2, 1]),
    case("Gemm", noise(8, 5), noise(5), shape=(8,)),
    case("Gemm", noise(5, 8), noise(1, 5), shape=(8,), transB=1, alpha=0.5, beta=2.0),
    case("Gemm", noise(8, 5), shape=(8,), alpha=0.5),
    case("MatMul", noise(8, 5)),
    case("Add", noise(3, 1, 1)),
    case("Sub", noise(8)),
    case("Mul", noise(1, 3, 8, 8)),
    case("Div", f32(0.3)),
    case("Pow", f32(2.0)),
    case("Pow", i64(3)),
    case("Max", noise(8), noise(3, 1, 1)),
    case("Min", f32(0.1)),
    case("Sum", noise(8), noise(3, 1, 1)),
    *(case(op) for op in ("Abs", "Neg", "Exp", "Relu", "Softplus", "Softsign", "Erf", "Sigmoid", "Tanh", "Floor")),
    *(case(op) for op in ("Identity", "Dropout", "GlobalAveragePool", "GlobalMaxPool", "Flatten", "Sign", "Ceil")),
    *(case(op, opset=18) for op in ("Mish",)),
    case("Dropout", opset=11, outputs=2),
    case("Dropout", f32(0.9), np.array(False)),
    case("LeakyRelu"),
    case("LeakyRelu", alpha=0.3),
    case("Elu"),
    case("Elu", alpha=0.3),
    case("Selu"),
    case("Selu", alpha=1.1, gamma=2.0),
    case("PRelu", noise(3, 1, 1)),
    case("HardSigmoid"),
    case("HardSigmoid", alpha=0.9, beta=0.2),
    case("HardSwish"),
    case("Gelu", opset=20),
    case("Gelu", opset=20, approximate="tanh"),
    *(case(op, opset=opset) for op in ("Softmax", "LogSoftmax") for opset in (11, 13)),
    case("Softmax", opset=11, axis=2),
    case("Softmax", opset=13, axis=1),
    case("MaxPool", kernel_shape=[3, 3]),
    case("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    case("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1]),
    case("MaxPool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    case("MaxPool", kernel_shape=[2, 2], strides=[4, 4], pads=[1, 1, 1, 1], ceil_mode=1, shape=(3, 6, 6)),
    case("MaxPool", kernel_shape=[2, 2], strides=[2, 2], dilations=[2, 3]),
    case("MaxPool", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER"),
    case("MaxPool", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_LOWER"),
    case("MaxPool", kernel_shape=[3], shape=(3, 9)),
    case("AveragePool", kernel_shape=[3, 3]),
    case("AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    case("AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], count_include_pad=1),
    case("AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 1, 2, 0], count_include_pad=1),
    case("AveragePool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    case("AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 1, 1, 0], ceil_mode=1, count_include_pad=1),
    case("AveragePool", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER"),
    case("AveragePool", kernel_shape=[3], shape=(3, 9), pads=[1, 1]),
    case("BatchNormalization", noise(3), noise(3), noise(3), noise(3) + 2, opset=14),
    case("BatchNormalization", noise(3), noise(3), noise(3), noise(3) + 2, epsilon=0.1, opset=8),
    case("LayerNormalization", noise(8), noise(8)),
    case("LayerNormalization", noise(8, 8), axis=2, epsilon=0.1),
    case("InstanceNormalization", noise(3), noise(3), epsilon=0.01),
    case("GroupNormalization", noise(6), noise(6), num_groups=2, shape=(6, 4, 4), opset=21),
    case("LRN", size=3, alpha=0.1, beta=0.5, bias=2.0),
    case("Flatten", axis=2),
    case("Flatten", axis=-1),
    case("Reshape", i64(0, 8, -1)),
    case("Transpose", perm=[0, 2, 3, 1]),
    case("Split", axis=1, outputs=3),
    case("Split", opset=11, axis=1, split=[1, 2], outputs=2),
    case("Split", i64(1, 2), opset=13, axis=1, outputs=2),
    case("Split", opset=18, axis=2, num_outputs=3, outputs=3),
    case("Slice", opset=9, starts=[1, 2], ends=[3, -1], axes=[1, 3]),
    case("Slice", i64(1), i64(2**62), i64(2)),
    case("Slice", i64(-1, 0), i64(-(2**62), 7), i64(2, 3), i64(-2, 3)),
    case("Slice", i64(0, 1), i64(2, 3)),
    case("Gather", i64(2, -1, 0), axis=1),
    case("Gather", np.array(1, np.int64), axis=2),
    case("Gather", i64(1, 2).reshape(2, 1), axis=-1),
    case("Pad", opset=9, pads=[0, 0, 1, 2, 0, 0, 3, 0], value=0.5),
    case("Pad", i64(0, 1, 1, 2, 0, 0, 3, 0), f32(0.5)),
    case("Pad", i64(0, 0, -1, 2, 0, 0, 3, -2)),
    case("Pad", i64(1, 2), None, i64(-1), opset=18),
    *(case("Pad", i64(0, 0, 1, 2, 0, 0, 3, 7), mode=mode) for mode in ("reflect", "edge")),
    case("Pad", i64(0, 0, 1, 2, 0, 0, 3, 7), mode="wrap", opset=19),
    case("Clip", opset=10, min=-0.5, max=0.2),
    case("Clip", f32(-0.5), f32(0.2)),
    case("Clip", None, f32(0.2)),
    *(case(f"Reduce{how}", axes=[2, 3]) for how in ("Mean", "Max", "Min", "L2")),
    *(case(f"Reduce{how}", i64(-1), keepdims=0, opset=18) for how in ("Mean", "Sum", "Max", "Min", "L2", "Prod")),
    case("ReduceProd", axes=[2, 3]),
    case("ReduceSum", opset=11, axes=[1]),
    case("ReduceSum", noop_with_empty_axes=1),
    case("Squeeze", opset=11, axes=[1], shape=(1, 4, 1)),
    case("Squeeze", i64(-1), shape=(1, 4, 1)),
    case("Squeeze", shape=(1, 4, 1)),
    case("Unsqueeze", opset=11, axes=[1, -1]),
    case("Unsqueeze", i64(0, 3), name="front"),
    case("Shape"),
    case("Shape", start=1, end=-1),
    case("Cast", to=TensorProto.INT64),
    case("Cast", to=TensorProto.DOUBLE),
    case("Expand", i64(2, 1, 5), shape=(3, 1)),
    case("Equal", f32(0.0)),
    *(case(op, f32(0.1)) for op in ("Greater", "Less", "GreaterOrEqual", "LessOrEqual")),
    case("ArgMax", axis=1),
    case("ArgMax", axis=-1, keepdims=0),
    case("ArgMax", axis=1, select_last_index=1),
    case("ArgMin", axis=1),
    case("Mod", f32(0.3), fmod=1),
    *(case(op) for op in ("Cos", "Sin", "Round", "Celu")),
    *(case(f"Reduce{how}", axes=[2, 3]) for how in ("L1", "LogSumExp", "SumSquare")),
    case("SpaceToDepth", blocksize=2),
    *(case("DepthToSpace", blocksize=2, mode=mode, shape=(8, 3, 3)) for mode in ("DCR", "CRD")),
    case("RMSNormalization", noise(8), opset=23, epsilon=0.1),
    case("Tile", i64(1, 2, 1, 3)),
    case("Einsum", equation="nchw->nhc"),
    case("Upsample", opset=7, mode="nearest", scales=[1.0, 1.0, 2.0, 3.0]),
    case("Upsample", f32([1, 1, 2, 2.5]), opset=9, mode="nearest"),
    case("Upsample", f32([1, 1, 2, 2]), opset=9, mode="linear"),
    case("Resize", f32([1, 1, 2, 2]), opset=10, mode="nearest"),
    case("Resize", None, f32([1, 1, 2, 0.5]), mode="nearest"),
    case("Resize", None, None, i64(2, 3, 5, 13), mode="nearest"),
    case("Resize", None, None, i64(5, 13), mode="nearest", axes=[2, 3], opset=18),
    *(
        case("Resize", None, f32([1, 1, 2, 2]), mode=mode, coordinate_transformation_mode=spacing, name="up")
        for mode in ("nearest", "linear")
        for spacing in ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
    ),
    *(
        case("Resize", None, None, i64(2, 3, 13, 5), mode="nearest", nearest_mode=way)
        for way in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
    ),
]


@pytest.mark.parametrize(("op", "inputs", "opset", "shape", "outputs", "attributes"), CASES)
def test_an_operator_gives_what_onnx_runtime_gives(op, inputs, opset, shape, outputs, attributes, tmp_path):
    constants = {f"c{i}": value for i, value in enumerate(inputs) if value is not None} | {"inner": i64(0, *shape)}
    names = [f"c{i}" if value is not None else "" for i, value in enumerate(inputs)]
    made, x = [f"o{i}" for i in range(outputs)], noise(2, 1, 1, int(np.prod(shape)), seed=1)
    for name in made if op == "Split" else made[:1]:
        nodes = [
            helper.make_node("Reshape", ["x", "inner"], ["in"]),  # the adapter wants four axes, not every operator
            helper.make_node(op, ["in", *names], made, **attributes),
            helper.make_node("Cast", [name], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Flatten", ["float"], ["y"], axis=0 if op == "Shape" else 1),
        ]
        path = store(tmp_path / "net.onnx", nodes, ("n", *x.shape[1:]), opset=opset, **constants)
        wanted = runtime(path, x)
        got = OnnxGraph(read(path))(torch.from_numpy(x))
        torch.testing.assert_close(got, wanted[: len(x)], rtol=1e-4, atol=1e-4)


def test_operators_of_positive_numbers(tmp_path):
    x = np.abs(noise(2, 3, 4, 4)) + 0.1
    for op in ("Sqrt", "Log", "Reciprocal"):
        nodes = [helper.make_node(op, ["x"], ["o"]), helper.make_node("Flatten", ["o"], ["y"])]
        path = store(tmp_path / f"{op}.onnx", nodes, ("n", 3, 4, 4))
        torch.testing.assert_close(OnnxGraph(read(path))(torch.from_numpy(x)), runtime(path, x), rtol=1e-4, atol=1e-4)


def test_shapes_that_are_computed(tmp_path):
    """Shape, Gather, Concat, ConstantOfShape, Range, Where, Not, Equal, integer Div and every kind of Constant."""
    node = helper.make_node
    nodes = [
        node("Shape", ["x"], ["shape"]),
        node("Constant", [], ["first"], value_int=0),
        node("Constant", [], ["none"], value_ints=[-1]),
        node("Constant", [], ["half"], value_float=0.5),
        node("Constant", [], ["two"], value=numpy_helper.from_array(np.array(2, np.int64))),
        node("Gather", ["shape", "first"], ["n"]),
        node("Unsqueeze", ["n", "front"], ["rows"]),
        node("Concat", ["rows", "none"], ["flat"], axis=0),
        node("Reshape", ["x", "flat"], ["long"]),
        node("Shape", ["long"], ["sizes"]),
        node("Gather", ["sizes", "one"], ["width"]),
        node("Div", ["width", "two"], ["middle"]),
        node("Range", ["first", "width", "one"], ["cells"]),
        node("Equal", ["cells", "middle"], ["there"]),
        node("Not", ["there"], ["elsewhere"]),
        node("ConstantOfShape", ["sizes"], ["filled"], value=numpy_helper.from_array(np.array([7], np.float32))),
        node("Where", ["elsewhere", "long", "filled"], ["chosen"]),
        node("Mul", ["chosen", "half"], ["y"]),
    ]
    path = store(tmp_path / "net.onnx", nodes, ("n", 3, 3, 3), front=i64(0), one=np.array(1, np.int64))
    for rows in (1, 5):
        x = images(rows, 3, 3)
        got = OnnxGraph(read(path))(x)
        assert got[0, 13] == 3.5
        torch.testing.assert_close(got, runtime(path, x), rtol=0, atol=0)


def test_outputs_that_nobody_named(tmp_path):
    nodes = [
        helper.make_node("Split", ["x"], ["", "middle", "last"], axis=1),
        helper.make_node("MaxPool", ["middle"], ["pooled", ""], kernel_shape=[2, 2]),
        helper.make_node("Clip", ["pooled", "", "high"], ["clipped"]),
        helper.make_node("Flatten", ["clipped"], ["y"]),
    ]
    path = store(tmp_path / "net.onnx", nodes, ("n", 3, 8, 8), high=f32(0.7))
    wanted = nn.functional.max_pool2d(images()[:, 1:2], 2, 1).clamp_max(0.7).flatten(1)  # ONNX Runtime 1.32 crashes
    torch.testing.assert_close(OnnxGraph(read(path))(images()), wanted, rtol=0, atol=0)


def test_values_are_freed_when_nobody_needs_them(tmp_path):
    nodes = [helper.make_node("Exp", [f"v{i}" if i else "x"], [f"v{i + 1}"]) for i in range(5)]
    path = store(tmp_path / "net.onnx", [*nodes, helper.make_node("Flatten", ["v5"], ["y"])], ("n", 3, 8, 8))
    graph, made, alive = OnnxGraph(read(path)), [], []

    def watched(run):
        def watch(*inputs):
            out = run(*inputs)
            made.append(weakref.ref(out))
            alive.append(sum(ref() is not None for ref in made))
            return out

        return watch

    graph._steps = [replace(step, run=watched(step.run)) for step in graph._steps]
    graph(images())
    assert alive == [1, 2, 2, 2, 2, 2]


class Residual(nn.Module):
    """Convolutions, batch norm, a skip, both poolings, a dropout, a view with a computed shape."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.norm, self.drop, self.out = nn.BatchNorm2d(8), nn.Dropout(), nn.Linear(8 * 16, 5)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.one(x).relu(), 2)
        x = nn.functional.silu(x + self.norm(self.two(x)))
        return self.out(self.drop(x.reshape(x.shape[0], -1)))


class Transformer(nn.Module):
    """Patches, layer norm, attention, GELU, a mean over tokens."""

    def __init__(self):
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 16, 4, stride=4), nn.LayerNorm(16)
        self.mix, self.wide, self.out = nn.Linear(16, 48), nn.Linear(16, 32), nn.Linear(32, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        q, k, v = (t.unflatten(2, (2, 8)).transpose(1, 2) for t in self.mix(self.norm(x)).chunk(3, -1))
        x = x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(nn.functional.gelu(self.wide(x)).mean(1))


def build(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = kind().train()
        net(torch.randn(64, 3, 8, 8))  # so that batch norm has seen something
    return net.eval()


def export(path, net, dynamo, rows=2, open_batch=True, size=(3, 8, 8)):
    x = torch.zeros(rows, *size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            pytest.importorskip("onnxscript")
            shapes = ({0: torch.export.Dim("n")},) if open_batch else None
            torch.onnx.export(net, (x,), str(path), dynamo=True, dynamic_shapes=shapes, verbose=False)
        else:
            axes = {"x": {0: "n"}, "y": {0: "n"}} if open_batch else None
            torch.onnx.export(net, (x,), str(path), dynamo=False, input_names=["x"], output_names=["y"],
                              dynamic_axes=axes)  # fmt: skip
    return path


each_exporter = pytest.mark.parametrize("dynamo", [False, True], ids=["script", "dynamo"])


@each_exporter
@pytest.mark.parametrize("kind", [Residual, Transformer])
def test_an_exported_network_keeps_its_logits_and_gradients(kind, dynamo, tmp_path):
    net, x = build(kind), images(6)
    path = export(tmp_path / "net.onnx", net, dynamo)
    model, scores = open_onnx(path), open_onnx(path, gradients=False)
    assert model.access == Access.GRADIENT
    wanted, got = (m.query(x, Access.GRADIENT) for m in (TorchModel(net), model))
    torch.testing.assert_close(got.logits, wanted.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.query(x, Access.SCORE).logits, wanted.logits, rtol=0, atol=1e-4)
    v = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    slope = wanted.vjp(v)
    assert slope.abs().max() > 1e-3
    torch.testing.assert_close(got.vjp(v), slope, rtol=0, atol=1e-5)


def test_onnx_runtime_shows_no_more_than_it_says(tmp_path):
    model = open_onnx(export(tmp_path / "net.onnx", build(Residual), False), gradients=False)
    assert model.access == Access.SCORE
    decision, score = model.query(images(), Access.DECISION), model.query(images(), Access.SCORE)
    assert decision.logits is None
    assert score.vjp is None
    assert torch.equal(decision.labels, score.logits.argmax(1))
    with pytest.raises(ModelError, match="gradients=True"):
        model.query(images(), Access.GRADIENT)


@pytest.mark.parametrize("gradients", [True, False])
def test_mean_and_std_are_part_of_the_model(gradients, tmp_path):
    net = build(Residual)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    model = open_onnx(
        export(tmp_path / "net.onnx", net, False), gradients=gradients, bounds=(0, 255), mean=mean, std=std
    )
    assert model.bounds == (0, 255)
    wanted = TorchModel(net, mean=mean, std=std).query(images(), Access.SCORE).logits
    torch.testing.assert_close(model.query(images(), Access.SCORE).logits, wanted, rtol=0, atol=1e-4)


@each_exporter
@pytest.mark.parametrize("last", [nn.Softmax(1), nn.LogSoftmax(-1)])
def test_a_softmax_at_the_end_is_dropped(last, dynamo, tmp_path):
    net = build(Residual)
    path = export(tmp_path / "net.onnx", nn.Sequential(net, last).eval(), dynamo)
    wanted = net(images()).detach()
    for gradients, said in product([True, False], [True, False]):
        got = open_onnx(path, gradients=gradients, probabilities=said).query(images(), Access.SCORE).logits
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("gradients", [True, False])
def test_only_a_softmax_over_classes_that_ends_the_graph_is_dropped(gradients, tmp_path):
    node, x = helper.make_node, images(4, 3, 2)
    flat = node("Flatten", ["x"], ["flat"])
    kept = {
        "rows": [flat, node("Softmax", ["flat"], ["y"], axis=0)],
        "inside": [flat, node("Softmax", ["flat"], ["s"], axis=1), node("Add", ["s", "s"], ["y"])],
        "more than an end": [flat, node("Softmax", ["flat"], ["y"], axis=1), node("Neg", ["y"], ["unused"])],
    }
    for name, nodes in kept.items():
        path = store(tmp_path / f"{name}.onnx", nodes, ("n", 3, 2, 2))
        got = open_onnx(path, gradients=gradients).query(x, Access.SCORE).logits
        torch.testing.assert_close(got, runtime(path, x), rtol=0, atol=1e-6)
    nodes = [flat, node("Softmax", ["flat"], ["s"], axis=1), node("Identity", ["s"], ["y"])]
    path = store(tmp_path / "end.onnx", nodes, ("n", 3, 2, 2))
    got = open_onnx(path, gradients=gradients).query(x, Access.SCORE).logits
    torch.testing.assert_close(got, x.flatten(1), rtol=0, atol=0)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize(("opset", "axis"), [(9, {}), (13, {"axis": 1}), (13, {"axis": -3}), (13, {})])
def test_logits_may_have_empty_axes_behind(opset, axis, gradients, tmp_path):
    """As in the SqueezeNet and DenseNet of the ONNX model zoo; by opset 13's default each class is alone: all 1."""
    node, weight = helper.make_node, noise(5, 3, 4, 4)
    nodes = [node("Conv", ["x", "w"], ["c"]), node("Softmax", ["c"], ["y"], **axis)]
    path = store(tmp_path / "net.onnx", nodes, ("n", 3, 4, 4), ("n", 5, 1, 1), opset=opset, w=weight)
    got = open_onnx(path, gradients=gradients).query(images(2, 3, 4), Access.SCORE).logits
    wanted = nn.functional.conv2d(images(2, 3, 4), torch.from_numpy(weight)).flatten(1)
    wanted = torch.ones_like(wanted) if (opset, axis) == (13, {}) else wanted
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_what_needs_no_image_is_computed_once(tmp_path):
    node = helper.make_node
    nodes = [
        node("Transpose", ["w"], ["turned"]),
        node("Flatten", ["x"], ["flat"]),
        node("MatMul", ["flat", "turned"], ["y"]),
    ]
    path = store(tmp_path / "net.onnx", nodes, ("n", 3, 2, 2), w=noise(5, 12))
    graph = OnnxGraph(read(path))
    assert [step.name for step in graph._steps] == ["Flatten", "MatMul"]
    assert [tuple(buffer.shape) for buffer in graph.buffers()] == [(12, 5)]
    torch.testing.assert_close(graph(images(2, 3, 2)), runtime(path, images(2, 3, 2)))


@pytest.mark.parametrize("gradients", [True, False])
def test_probabilities_that_no_softmax_made(gradients, tmp_path):
    node = helper.make_node
    nodes = [
        node("Flatten", ["x"], ["flat"]),
        node("Exp", ["flat"], ["e"]),
        node("ReduceSum", ["e", "last"], ["sum"]),
        node("Div", ["e", "sum"], ["y"]),
    ]
    path = store(tmp_path / "net.onnx", nodes, ("n", 3, 2, 2), last=i64(1))
    x = images(4, 3, 2)
    got = open_onnx(path, gradients=gradients, probabilities=True).query(x, Access.SCORE).logits
    torch.testing.assert_close(got, x.flatten(1).log_softmax(1), rtol=0, atol=1e-5)


class View(nn.Module):
    """A view that bakes the batch into the graph."""

    def __init__(self, rows, net):
        super().__init__()
        self.rows, self.net = rows, net

    def forward(self, x):
        return self.net(x.view(self.rows, 3, 64).view(self.rows, 3, 8, 8))


@pytest.mark.parametrize("rows", [1, 3])
def test_a_fixed_batch_serves_any(rows, tmp_path):
    net = build(Residual)
    path = export(tmp_path / "net.onnx", View(rows, net).eval(), False, rows=rows, open_batch=False)
    x, model = images(7), open_onnx(path)
    assert model.net._at_once
    leaf = x.clone().requires_grad_()
    wanted = net(leaf)
    got = model.query(x, Access.GRADIENT)
    torch.testing.assert_close(got.logits, wanted.detach(), rtol=0, atol=1e-5)
    v = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    slope = torch.autograd.grad(wanted, leaf, v)[0]
    torch.testing.assert_close(got.vjp(v), slope, rtol=0, atol=1e-5)
    model.net._at_once = False  # where the pieces cannot be carried out together
    torch.testing.assert_close(model.query(x, Access.GRADIENT).vjp(v), slope, rtol=0, atol=1e-5)
    scores = open_onnx(path, gradients=False).query(x, Access.SCORE).logits
    torch.testing.assert_close(scores, wanted.detach(), rtol=0, atol=1e-4)


def test_pieces_that_cannot_go_together_go_one_by_one(tmp_path):
    """Tile asks the value of a tensor that hangs on the image, which no vmap can give."""
    node = helper.make_node
    nodes = [
        node("Flatten", ["x"], ["flat"]),
        node("ReduceMax", ["flat"], ["most"], keepdims=0),
        node("Ceil", ["most"], ["up"]),
        node("Cast", ["up"], ["whole"], to=TensorProto.INT64),
        node("Unsqueeze", ["whole", "zero"], ["times"]),
        node("Concat", ["times", "one"], ["both"], axis=0),
        node("Tile", ["flat", "both"], ["y"]),
    ]
    path = store(tmp_path / "net.onnx", nodes, (1, 3, 2, 2), (1, 12), zero=i64(0), one=i64(1))
    model, x = open_onnx(path), images(5, 3, 2)
    assert not model.net._at_once
    torch.testing.assert_close(model.query(x, Access.SCORE).logits, x.flatten(1), rtol=0, atol=0)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("shape", [("n", 8, 8, 3), ("n", None, None, 3), ("n", 8, 8, 1), (2, 8, 8, 3)])
def test_channels_last_is_recognised(shape, gradients, tmp_path):
    net, channels = nn.Conv2d(shape[3], 5, 8).requires_grad_(False), shape[3]
    node = helper.make_node
    nodes = [
        node("Transpose", ["x"], ["images"], perm=[0, 3, 1, 2]),
        node("Conv", ["images", "weight", "bias"], ["c"]),
        node("Flatten", ["c"], ["y"]),
    ]
    path = store(tmp_path / "net.onnx", nodes, shape, weight=net.weight.numpy(), bias=net.bias.numpy())
    x = images(3, channels)
    got = open_onnx(path, gradients=gradients).query(x, Access.SCORE).logits
    torch.testing.assert_close(got, net(x).flatten(1), rtol=0, atol=1e-5)
    if gradients:
        v = torch.ones(3, 5)
        slope = open_onnx(path).query(x, Access.GRADIENT).vjp(v)
        torch.testing.assert_close(slope, net.weight.sum(0).expand(3, -1, -1, -1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [("n", 3, 8, 8), ("n", 1, 8, 3), ("n", 3, 3, 3)])
def test_channels_first_stays(shape, tmp_path):
    path = store(tmp_path / "net.onnx", [helper.make_node("Flatten", ["x"], ["y"])], shape)
    x = torch.rand(2, *shape[1:], generator=torch.Generator().manual_seed(0))
    assert torch.equal(open_onnx(path).query(x, Access.SCORE).logits, x.flatten(1))


@pytest.mark.parametrize("dtype", [TensorProto.DOUBLE, TensorProto.FLOAT16])
@pytest.mark.parametrize("gradients", [True, False])
def test_other_floats_are_converted(dtype, gradients, tmp_path):
    nodes = [helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT), helper.make_node("Flatten", ["f"], ["y"])]
    path = store(tmp_path / "net.onnx", nodes, ("n", 3, 2, 2), dtype=dtype)
    x = images(2, 3, 2)
    got = open_onnx(path, gradients=gradients).query(x, Access.SCORE).logits
    torch.testing.assert_close(got, x.flatten(1), rtol=0, atol=1e-3)


def test_all_that_is_lacking_is_named_at_once(tmp_path):
    node = helper.make_node
    nodes = [
        node("Det", ["x"], ["a"]),
        node("Resize", ["x", "", "scales"], ["b"], mode="cubic"),
        node("Gelu", ["x"], ["c"], domain="com.microsoft"),
        node("MaxPool", ["x"], ["d", "where"], kernel_shape=[1, 1]),
        node("Flatten", ["x"], ["y"]),
    ]
    path = store(tmp_path / "net.onnx", nodes, ("n", 3, 8, 8), scales=f32([1, 1, 2, 2]))
    with pytest.raises(ModelError) as caught:
        open_onnx(path)
    told = str(caught.value)
    for name in (
        "Det,",
        "Resize with mode=cubic",
        "com.microsoft.Gelu;",
        "MaxPool with 2 outputs",
        "gradients=False",
    ):
        assert name in told
    assert "Flatten" not in told
    got = open_onnx(path, gradients=False).query(images(), Access.SCORE).logits
    torch.testing.assert_close(got, images().flatten(1))


def test_files_that_are_no_classifiers(tmp_path):
    flat, path = helper.make_node("Flatten", ["x"], ["y"]), tmp_path / "net.onnx"
    cases = {
        r"expected an input \(n, c, h, w\), got \(\?, 784\)": ([flat], ("n", 784), {}),
        r"expected logits \(n, classes\), got \(\?, 3, 8, 8\)": (
            [helper.make_node("Relu", ["x"], ["y"])], ("n", 3, 8, 8), {"out": ("n", 3, 8, 8)},
        ),
        r"expected an input of floats, got torch.uint8": ([flat], ("n", 3, 8, 8), {"dtype": TensorProto.UINT8}),
        r"expected one output, .* got 2 \(y, z\); .*extract_model": (
            [flat, helper.make_node("Identity", ["y"], ["z"])], ("n", 3, 8, 8), {"outputs": ("y", "z")},
        ),
        "expected opset 7 or later, got 6; .*version_converter": ([flat], ("n", 3, 8, 8), {"opset": 6}),
    }  # fmt: skip
    for match, (nodes, shape, more) in cases.items():
        store(path, nodes, shape, **more)
        for gradients in (True, False):
            with pytest.raises(ModelError, match=match):
                open_onnx(path, gradients=gradients)


@pytest.mark.parametrize("gradients", [True, False])
def test_sizes_may_be_left_open(gradients, tmp_path):
    path = store(tmp_path / "net.onnx", [helper.make_node("Flatten", ["x"], ["y"])], None, None)
    got = open_onnx(path, gradients=gradients).query(images(), Access.SCORE).logits
    assert torch.equal(got, images().flatten(1))


def test_two_inputs_are_refused_and_weights_are_no_inputs(tmp_path):
    path = store(
        tmp_path / "net.onnx",
        [helper.make_node("Add", ["x", "w"], ["s"]), helper.make_node("Flatten", ["s"], ["y"])],
        ("n", 3, 8, 8),
        w=noise(3, 8, 8),
    )
    proto = onnx.load(str(path))
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, (3, 8, 8)))  # as before IR 4
    path.write_bytes(proto.SerializeToString())
    x = images()
    torch.testing.assert_close(open_onnx(path).query(x, Access.SCORE).logits, runtime(path, x))
    del proto.graph.initializer[:]
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=r"expected one input, .* got 2 \(x, w\)"):
        open_onnx(path)


@pytest.mark.parametrize("gradients", [True, False])
def test_damaged_files(gradients, tmp_path):
    path = export(tmp_path / "net.onnx", build(Residual), False)
    whole = path.read_bytes()
    for bad in (b"", b"\x89PNG\r\n\x1a\n" + bytes(100), whole[: len(whole) // 2], whole[:-3], b"not a model" * 50):
        path.write_bytes(bad)
        with pytest.raises(ModelError, match="expected an ONNX model"):
            open_onnx(path, gradients=gradients)
    with pytest.raises(UsageError, match=r"no file .*absent\.onnx"):
        open_onnx(tmp_path / "absent.onnx", gradients=gradients)


def test_the_packages_are_imported_when_used():
    code = "import sys, sparring.models.onnx; print(*{'onnx', 'onnxruntime'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(("package", "gradients"), [("onnx", True), ("onnxruntime", False)])
def test_a_missing_package_is_named_with_its_install_line(package, gradients, tmp_path, monkeypatch):
    path = store(tmp_path / "net.onnx", [helper.make_node("Flatten", ["x"], ["y"])], ("n", 3, 8, 8))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf"{package}; pip install 'sparring\[onnx\]'"):
        open_onnx(path, gradients=gradients)


@pytest.mark.parametrize("gradients", [True, False])
def test_images_of_another_size_are_refused(gradients, tmp_path):
    path = store(tmp_path / "net.onnx", [helper.make_node("Flatten", ["x"], ["y"])], ("n", 3, 8, 8))
    with pytest.raises(ModelError, match=r"expected images \(\?, 3, 8, 8\), got \(4, 1, 8, 8\)"):
        open_onnx(path, gradients=gradients).query(images(4, 1), Access.SCORE)


def test_a_node_that_fails_is_named(tmp_path):
    node = helper.make_node("Reshape", ["x", "to"], ["y"], name="squash")
    path = store(tmp_path / "net.onnx", [node], ("n", 3, 8, 8), to=i64(2, 50))
    with pytest.raises(ModelError, match="node Reshape squash: shape"):
        open_onnx(path).query(images(), Access.SCORE)


def test_a_dropout_in_training_mode_is_refused(tmp_path):
    nodes = [helper.make_node("Dropout", ["x", "r", "t"], ["d"]), helper.make_node("Flatten", ["d"], ["y"])]
    path = store(tmp_path / "net.onnx", nodes, ("n", 3, 8, 8), r=f32(0.5), t=np.array(True))
    with pytest.raises(ModelError, match="Dropout in training mode"):
        open_onnx(path).query(images(), Access.SCORE)


@each_exporter
@pytest.mark.parametrize("open_batch", [True, False])
def test_an_attack_finds_on_the_file_what_it_finds_on_the_network(open_batch, dynamo, net, digits, tmp_path):
    path = export(tmp_path / "net.onnx", net, dynamo, rows=2 if open_batch else 1, open_batch=open_batch,
                  size=(1, 8, 8))  # fmt: skip
    x, y = digits[0][1500:1550], digits[1][1500:1550]
    wanted, got = (run(m, PGD(steps=10), Linf(0.1), x, y) for m in (TorchModel(net), open_onnx(path)))
    assert 0 < int(wanted.found.sum()) < 50
    for field in ("clean", "found", "moved", "failed", "label", "forward", "backward"):
        assert torch.equal(getattr(got, field), getattr(wanted, field)), field
    torch.testing.assert_close(got.best, wanted.best, rtol=0, atol=1e-4)


def test_a_score_based_attack_runs_on_onnx_runtime(net, digits, tmp_path):
    path = export(tmp_path / "net.onnx", net, False, size=(1, 8, 8))
    x, y = digits[0][1500:1530], digits[1][1500:1530]
    models = (TorchModel(net), open_onnx(path, gradients=False))
    wanted, got = (run(m, Square(steps=50), Linf(0.15), x, y) for m in models)
    assert 0 < int(wanted.found.sum()) < 30
    assert torch.equal(got.found, wanted.found)
