"""What a model becomes: the same function, node by node, from whatever it is written in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparring.certificates.graph import trace
from sparring.certificates.operators import Activation, Conv, Linear, Maximum
from sparring.core.errors import ModelError
from sparring.core.model import Access
from sparring.models.nets import NETS, build
from sparring.models.torch import TorchModel


class Odd(nn.Module):
    """Most of the shapes and sums that a network may have between its layers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2, bias=False)
        self.head = nn.Linear(60, 4, bias=False)

    def forward(self, x):
        h = 2.0 - self.conv(x) / 0.5
        h = torch.maximum(h, -h + 0.1).permute(0, 2, 3, 1) * torch.tensor([1.0, -2.0, 0.5, 3.0])
        h = nn.functional.relu6(h - 1).transpose(1, 3)
        h = nn.functional.pad(h, (1, 0, 0, 1), value=0.25)
        h = torch.cat([h[:, 1:3, :, ::2], h[:, :1, :, ::2].mean(1, keepdim=True)], 1)
        h = nn.functional.interpolate(h.unsqueeze(4).squeeze(4).unsqueeze(2).squeeze(2), size=(5, 4), mode="nearest")
        h = h.clamp(min=0.1) + 0.5 * h.clamp(max=1.5)
        return self.head(h.reshape(len(x), -1)) - 1


def same(net, shape, **options):
    model = TorchModel(net.eval(), **options)
    graph = trace(model, shape).graph()
    x = torch.rand(5, *shape, generator=torch.Generator().manual_seed(3))
    logits = model.query(x, Access.SCORE).logits
    torch.testing.assert_close(graph.forward(x.double()).float(), logits, rtol=1e-4, atol=1e-4)
    return graph


def test_every_kind_of_layer(name, make):
    same(make(name), (2, 6, 6), mean=(0.3, 0.4), std=(0.5, 0.8))


@pytest.mark.parametrize("net", sorted(NETS))
def test_our_own_nets(net):
    graph = same(build(net, (1, 12, 12), 10), (1, 12, 12))
    assert graph.classes == 10
    assert len(graph.activations()) == (2 if net == "dense" else 5 if "contrast" in net else 3)


def test_odd_shapes_and_sums():
    torch.manual_seed(0)
    graph = same(Odd(), (2, 6, 6))
    assert any(isinstance(node.op, Maximum) for node in graph.nodes)


@pytest.mark.parametrize("options", [{"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1},
                                     {"kernel_size": (2, 3), "stride": 2, "ceil_mode": True}])  # fmt: skip
def test_maximum_pooling(options):
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.MaxPool2d(**options), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    same(nn.Sequential(net, nn.Linear(12, 3)), (2, 8, 7))


def test_an_onnx_graph(tmp_path):
    onnx = pytest.importorskip("onnx")
    from sparring.models.onnx import open_onnx

    net = build("conv", (1, 8, 8), 4).eval()
    weights = {k.replace(".", "_"): v.detach().numpy() for k, v in net.state_dict().items()}
    make, nodes, value = onnx.helper, [], "x"
    for at, part in enumerate(net):
        kind = type(part).__name__
        held = [f"{at}_weight", f"{at}_bias"] if kind in ("Conv2d", "Linear") else []
        op = {"Conv2d": "Conv", "Linear": "Gemm", "ReLU": "Relu", "Flatten": "Flatten"}[kind]
        options = {"Conv2d": {"strides": [2, 2], "pads": [1] * 4}, "Linear": {"transB": 1}}.get(kind, {})
        nodes.append(make.make_node(op, [value, *held], [f"v{at}"], **options))
        value = f"v{at}"
    ends = [make.make_tensor_value_info(n, 1, s) for n, s in (("x", [None, 1, 8, 8]), (value, [None, 4]))]
    held = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = make.make_graph(nodes, "g", ends[:1], ends[1:], held)
    proto = make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=9)
    onnx.save(proto, str(tmp_path / "net.onnx"))
    found = trace(open_onnx(tmp_path / "net.onnx"), (1, 8, 8)).graph()
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(found.forward(x), net.double()(x))
    assert [type(node.op) for node in found.nodes[1:]] == [
        type(node.op) for node in trace(TorchModel(net.float()), (1, 8, 8)).graph().nodes[1:]
    ]


def test_the_trace_follows_the_weights_and_trains_them():
    net = build("conv", (1, 8, 8), 3).eval()
    traced = trace(TorchModel(net), (1, 8, 8))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.5)
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(traced.graph(torch.float32).forward(x), net(x).detach())
    assert not traced.graph().forward(x.double()).requires_grad
    trained = traced.graph(torch.float32, trainable=True).forward(x).square().sum()
    ours = torch.autograd.grad(trained, list(net.parameters()))
    theirs = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_spread_and_transpose_are_those_of_the_matrix(name, make):
    graph = same(make(name), (2, 6, 6))
    for node in graph.nodes[1:]:
        if not isinstance(node.op, Linear) or isinstance(node.op, Maximum):
            continue
        shapes = [graph.nodes[i].shape for i in node.inputs]
        zero = [torch.zeros(1, *shape, dtype=torch.float64) for shape in shapes]
        offset = node.op.forward(*zero)
        if node.op.offset is not None:
            torch.testing.assert_close(offset[0], node.op.offset.expand(node.shape))
        for k, shape in enumerate(shapes):
            size = zero[k].numel()
            columns = [z.expand(size, *z.shape[1:]) for z in zero]
            columns[k] = torch.eye(size, dtype=torch.float64).view(size, *shape)
            matrix = (node.op.forward(*columns) - offset).flatten(1)  # (in, out)
            a = torch.randn(3, *node.shape, dtype=torch.float64)
            pulled = node.op.transpose(a)[k]
            torch.testing.assert_close(pulled.flatten(1), a.flatten(1) @ matrix.T)
            radii = [torch.zeros_like(z) for z in zero]
            radii[k] = torch.rand(1, *shape, dtype=torch.float64)
            torch.testing.assert_close(node.op.spread(*radii).flatten(1), radii[k].flatten(1) @ matrix.abs())


class Bad(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run, self.head = run, nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.run(x).flatten(1))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda x: x.exp(), "no linear bounds for the operation 'exp' \\(on \\('n', 1, 4, 4\\)\\)"),
        (lambda x: x * x.relu(), "product with a constant"),
        (lambda x: 1.0 / (x + 1), "reciprocal"),
        (lambda x: x - x.mean(0, keepdim=True), "rows that do not mix|joins them"),
        (lambda x: x.flip(0), "flip"),
        (lambda x: x[[1, 0]], "index"),
        (lambda x: x.half().relu().float(), "float32 or float64, got torch.float16"),
        (lambda x: x if x.sum() > 3 else -x, "the same way for every image"),
        (lambda x: torch.from_numpy(x.numpy() * 2), "torch alone computes"),
        (lambda x: torch.ones_like(x), "ones_like"),
        (lambda x: torch.ones(2, 1, 4, 4), "a constant"),
        (lambda x: x + torch.rand(1), "no proof"),
    ],
)
def test_what_cannot_be_bounded_is_named(run, message):
    with pytest.raises(ModelError, match=message):
        trace(TorchModel(Bad(run).eval()), (1, 4, 4))


def test_batch_norm_in_train_mode_is_refused():
    model = TorchModel(lambda x: nn.functional.batch_norm(x, torch.zeros(1), torch.ones(1), training=True).flatten(1))
    with pytest.raises(ModelError, match="eval mode"):
        trace(model, (1, 2, 2))


def test_nodes_that_nothing_needs_are_left_out():
    graph = same(nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2)), (1, 4, 4))
    kinds = [type(node.op) for node in graph.nodes]
    assert kinds.count(Conv) == 1
    assert kinds.count(Activation) == 1
    assert len(kinds) == 5
