"""The guard against what the model rounds: never passed, by float32 nor by much coarser arithmetic."""

from __future__ import annotations

import torch
from torch import nn

from sparring.certificates.crown import crown
from sparring.certificates.graph import trace
from sparring.certificates.ibp import intervals
from sparring.certificates.region import region
from sparring.certificates.rounding import guard, logit_error, unit
from sparring.core.threat import Linf
from sparring.models.torch import TorchModel

NORM = {"mean": (0.3, 0.4), "std": (0.5, 0.8)}


def coarse(net, dtype):
    """Make every layer of `net` compute in `dtype`: inputs, weights and outputs are rounded to it."""

    def rounded(module, inputs, output):
        return output.to(dtype).to(output.dtype)

    for part in net.modules():
        if not list(part.children()):
            part.register_forward_hook(rounded)
            for tensor in (*part.parameters(), *part.buffers()):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype).to(tensor.dtype)
    return net


def test_logits_in_float32_lie_within_the_error(name, make, images, graph_of):
    net, (x, _) = make(name), images(200)
    graph = graph_of(net)
    bounds = intervals(graph, region(Linf(0.0), x))
    error = logit_error(graph, bounds, unit(x.device))
    off = (TorchModel(net, **NORM).query(x, 1).logits.double() - graph.forward(x.double())).abs()
    assert (off <= error).all()
    assert (error < 1e-2).all()
    assert off.max() > 0


def test_logits_in_bfloat16_lie_within_its_error(make, images, graph_of):
    for kind in ("dense", "conv", "max pool", "sigmoid"):
        net, (x, _) = make(kind), images(200)
        x = x.bfloat16().float()
        with torch.no_grad():
            rough = coarse(make(kind), torch.bfloat16)
            for a, b in zip(net.parameters(), rough.parameters(), strict=True):
                a.copy_(b)
            off = (TorchModel(rough).query(x, 1).logits - TorchModel(net).query(x, 1).logits).abs()
            graph = trace(TorchModel(net), x.shape[1:]).graph()
        error = logit_error(graph, intervals(graph, region(Linf(0.0), x)), 2.0**-9)
        assert (off <= error).all(), kind
        assert off.max() > 1e-4


def test_tighter_bounds_have_a_smaller_guard_and_coarser_arithmetic_a_larger(make, images, graph_of):
    graph, (x, y) = graph_of(make("conv")), images(5)
    where = region(Linf(0.1), x)
    tight, loose = (guard(graph, b, y, 2.0**-24) for b in (crown(graph, where).bounds, intervals(graph, where)))
    assert (tight <= loose).all()
    assert (tight < loose).any()
    assert (guard(graph, intervals(graph, where), y, 2.0**-11) > 1000 * loose).all()


def test_the_error_of_one_layer_is_that_of_the_textbook():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    graph = trace(TorchModel(net), (1, 2, 2)).graph()
    x = torch.tensor([0.25, 0.5, 0.75, 1.0]).view(1, 1, 2, 2)
    bounds = {0: (x.double(), x.double()), 1: (x.double().flatten(1),) * 2}
    unit_ = 2.0**-24
    gamma = (5 + 4) * unit_ / (1 - 9 * unit_)
    weight, bias = net[1].weight.detach().double().abs(), net[1].bias.detach().double().abs()
    expected = gamma * (x.double().flatten(1) @ weight.T + bias)  # nothing for the reshape
    torch.testing.assert_close(logit_error(graph, bounds, unit_), expected)


def test_the_unit_follows_what_torch_is_allowed():
    assert unit(torch.device("cpu")) == 2.0**-24
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert unit(torch.device("cpu")) == 2.0**-11
        torch.set_float32_matmul_precision("medium")
        assert unit(torch.device("cpu")) == 2.0**-8
    finally:
        torch.set_float32_matmul_precision(before)
