"""CROWN against a second implementation in loops, against closed forms, and against the looser methods."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from sparring.certificates import pulling, windows
from sparring.certificates.alpha import ascend
from sparring.certificates.ascent import Ascent
from sparring.certificates.bounds import bounds
from sparring.certificates.crown import crown, crown_ibp, interval_lines, lower_bounds, margins
from sparring.certificates.graph import trace
from sparring.certificates.ibp import intervals
from sparring.certificates.pulling import pull
from sparring.certificates.region import region
from sparring.core.errors import ModelError
from sparring.core.threat import L2, Linf
from sparring.models.nets import build
from sparring.models.torch import TorchModel


def affine_layers(net, shape):
    """The affine layers of a sequential ReLU net as dense (W, b), found by asking each for its columns."""
    layers, block = [], []
    size = int(np.prod(shape))
    for part in [*net, None]:
        if isinstance(part, nn.ReLU) or part is None:
            chunk = nn.Sequential(*block).double()
            with torch.no_grad():
                out = chunk(torch.cat([torch.zeros(1, size), torch.eye(size)]).double().view(-1, *shape))
            shape = tuple(out.shape[1:])
            out = out.flatten(1).numpy()
            layers.append(((out[1:] - out[0]).T, out[0]))
            size, block = out.shape[1], []
        else:
            block.append(part)
    return layers


def by_loops(layers, low, high, ask):
    """The lower bounds of ask . logits, layer by layer and neuron by neuron (Zhang et al. 2018, theorem 3.2)."""
    before = []  # of each hidden layer: l, u

    def back(row, depth, upper):
        """A bound of `row` . z where z are the arguments after `depth` hidden layers."""
        weight, bias = layers[depth]
        constant, row = row @ bias, row @ weight
        for k in reversed(range(depth)):
            left, right = before[k]
            new = np.zeros_like(row)
            for i, a in enumerate(row):
                if right[i] <= 0:
                    continue
                if left[i] >= 0:
                    new[i] = a
                elif (a < 0) != upper:  # the line above
                    slope = right[i] / (right[i] - left[i])
                    new[i], constant = a * slope, constant - a * slope * left[i]
                elif right[i] > -left[i]:
                    new[i] = a
            weight, bias = layers[k]
            constant, row = constant + new @ bias, new @ weight
        ends = np.where((row < 0) != upper, high, low)
        return constant + row @ ends

    inside = (low, high)
    for depth in range(len(layers) - 1):
        weight, bias = layers[depth]
        middle, reach = weight @ (inside[0] + inside[1]) / 2 + bias, np.abs(weight) @ (inside[1] - inside[0]) / 2
        left, right = middle - reach, middle + reach
        for i, e in enumerate(np.eye(len(bias))):
            if left[i] < 0 < right[i]:  # else an interval is enough
                left[i], right[i] = max(left[i], back(e, depth, False)), min(right[i], back(e, depth, True))
        before.append((left, right))
        inside = (np.maximum(left, 0), np.maximum(right, 0))
    return np.array([back(a, len(layers) - 1, False) for a in ask]), before


@pytest.mark.parametrize("kind", ["dense", "conv", "batch norm"])
@pytest.mark.parametrize("eps", [0.01, 0.05, 0.3])
def test_the_loops_find_the_same_bounds(kind, eps, make, images):
    net, (x, y) = make(kind), images(3)
    graph = trace(TorchModel(net), x.shape[1:]).graph()
    where = region(Linf(eps), x)
    relaxed = crown(graph, where)
    lower, _ = lower_bounds(graph, y, relaxed.lines, where)
    ask = margins(graph, y, where.low)
    layers = affine_layers(net, x.shape[1:])
    arguments = [graph.nodes[at].inputs[0] for at in graph.activations()]
    for i in range(len(x)):
        low, high = where.low[i].flatten().numpy(), where.high[i].flatten().numpy()
        found, before = by_loops(layers, low, high, ask[i].numpy())
        np.testing.assert_allclose(lower[i].numpy(), found, rtol=1e-7, atol=1e-6)
        for at, (left, right) in zip(arguments, before, strict=True):
            ours = [end[i].flatten().numpy() for end in relaxed.bounds[at]]
            np.testing.assert_allclose(ours[0], left, rtol=1e-7, atol=1e-6)
            np.testing.assert_allclose(ours[1], right, rtol=1e-7, atol=1e-6)


@pytest.mark.parametrize("eps", [0.01, 0.03, 0.1])
@pytest.mark.parametrize("kind", ["conv", "batch norm", "max pool", "residual", "sigmoid"])
def test_each_method_is_tighter_than_the_one_before(kind, eps, make, images, graph_of):
    graph, (x, y) = graph_of(make(kind)), images(6)
    where = region(Linf(eps), x)
    from_intervals, relaxed = crown_ibp(graph, where), crown(graph, where)
    for at in relaxed.bounds:
        width = [(b[1] - b[0]).mean() for b in (relaxed.bounds[at], from_intervals.bounds[at])]
        assert width[0] <= width[1] + 1e-12
    found = [
        lower_bounds(graph, y, interval_lines(graph, from_intervals.bounds), where)[0],
        lower_bounds(graph, y, from_intervals.lines, where)[0],
        lower_bounds(graph, y, relaxed.lines, where)[0],
        ascend(graph, len(graph.nodes) - 1, margins(graph, y, where.low), relaxed.lines, where, Ascent(), 20)[0],
    ]
    deep = crown(graph, where, known=relaxed.bounds, ascent=Ascent(deep=10))
    found.append(lower_bounds(graph, y, deep.lines, where)[0])
    for at, (low, high) in deep.bounds.items():
        assert (low >= relaxed.bounds[at][0]).all()
        assert (high <= relaxed.bounds[at][1]).all()
    means = [lower.mean().item() for lower in (*found[:3], max(found[3:], key=torch.mean))]
    assert found[4].mean() >= means[2]
    assert means == sorted(means)
    assert means[2] > means[1]


@pytest.mark.parametrize("threat", [Linf(0.2), L2(0.7)], ids=lambda t: t.norm)
def test_a_linear_model_is_exact(threat, images):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 3)).eval()
    x, y = images(20)
    model = TorchModel(net, mean=(0.1, 0.2), std=(0.5, 0.9))
    found = bounds(model, x, y, threat, "linear")
    graph = trace(model, x.shape[1:]).graph()
    reached = torch.einsum("nk,nsk->ns", graph.forward(found.worst.double()), margins(graph, y, found.lower))
    weakest = (found.lower - found.guard).argmin(1, keepdim=True)
    gap = reached.gather(1, weakest) - found.lower.gather(1, weakest)
    assert (gap >= -1e-6).all()
    assert (gap <= 1e-4).all()
    for method in ("crown", "crown-ibp", "alpha-crown"):
        torch.testing.assert_close(bounds(model, x, y, threat, method).lower, found.lower)
    with pytest.raises(ModelError, match="expected a linear model, got one with relu"):
        bounds(TorchModel(nn.Sequential(net, nn.ReLU())), x, y, threat, "linear")


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.6)], ids=lambda t: t.norm)
@pytest.mark.parametrize("kind", ["conv", "batch norm", "tanh", "clipped"])
def test_windows_say_what_whole_maps_say(kind, threat, make, images, monkeypatch):
    net, (x, _) = make(kind), images(4)
    graph = trace(TorchModel(net), x.shape[1:]).graph()
    where = region(threat, x)
    monkeypatch.setattr(windows, "_WORTH", 10.0)
    in_windows, climbed = crown(graph, where), crown(graph, where, ascent=Ascent(deep=4))
    paths = [windows.chain(graph, graph.nodes[at].inputs[0]) for at in graph.activations()]
    assert sum(path is not None for path in paths) >= 2
    monkeypatch.setattr(windows, "_MATRIX", 0)
    convolved = crown(graph, where)
    monkeypatch.setattr(windows, "chain", lambda graph, at: None)
    whole, climbed_whole = crown(graph, where), crown(graph, where, ascent=Ascent(deep=4))
    for at, (low, high) in climbed_whole.bounds.items():  # each question climbs by itself, so the climbs agree too
        torch.testing.assert_close(climbed.bounds[at][0], low, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(climbed.bounds[at][1], high, rtol=1e-5, atol=1e-6)
    for at, (low, high) in whole.bounds.items():
        for other in (in_windows, convolved):
            torch.testing.assert_close(other.bounds[at][0], low)
            torch.testing.assert_close(other.bounds[at][1], high)


def test_one_row_alone_is_bounded_as_among_others(name, make, images, graph_of):
    graph, (x, y) = graph_of(make(name)), images(5)
    where = region(Linf(0.05), x)
    together, _ = lower_bounds(graph, y, crown(graph, where).lines, where)
    for i in range(5):
        alone = where.take(torch.tensor([i]))
        lower, _ = lower_bounds(graph, y[i : i + 1], crown(graph, alone).lines, alone)
        torch.testing.assert_close(lower[0], together[i])


@pytest.mark.parametrize("kind", ["conv", "batch norm", "max pool", "sigmoid", "residual"])
@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
def test_gradients_of_the_bounds_are_those_of_finite_differences(kind, method, make, images):
    net, (x, y) = make(kind).double(), images(2)
    traced = trace(TorchModel(net.float()), x.shape[1:])
    net.double()
    where = region(Linf(0.03), x)

    def value():
        graph = traced.graph(trainable=True)
        if method == "ibp":
            lines = interval_lines(graph, intervals(graph, where))
        else:
            lines = {"crown-ibp": crown_ibp, "crown": crown}[method](graph, where).lines
        return lower_bounds(graph, y, lines, where)[0].sum()

    parameters = [p for p in net.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(value(), parameters)
    torch.manual_seed(0)
    ways = [torch.randn_like(p) for p in parameters]
    slope = sum((g * w).sum() for g, w in zip(gradients, ways, strict=True))
    step = 1e-7
    with torch.no_grad():
        ends = []
        for sign in (1, -2):
            for p, w in zip(parameters, ways, strict=True):
                p.add_(sign * step * w)
            ends.append(value())
    assert slope.item() == pytest.approx(((ends[0] - ends[1]) / (2 * step)).item(), rel=1e-3)


def test_a_proof_pauses_before_every_pull(monkeypatch):
    pulls, paused = [0], [0]

    def counted(original):
        def one(*given, **options):
            pulls[0] += 1
            return original(*given, **options)

        return one

    def pause():
        paused[0] += 1

    monkeypatch.setattr(pulling, "linear", counted(pulling.linear))
    monkeypatch.setattr(windows, "_pull", counted(windows._pull))
    traced = replace(trace(TorchModel(build("conv", (1, 28, 28), 4).eval()), (1, 28, 28)), pause=pause)
    x = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    crown(traced.graph(), region(Linf(0.05), x))
    assert paused[0] == pulls[0] > 2


def test_a_question_nobody_can_answer_from_the_image_is_a_constant(make, images, graph_of):
    graph, (x, _) = graph_of(make("dense")), images(2)
    where = region(Linf(0.1), x)
    zero = torch.zeros(2, 1, 3, dtype=torch.float64)
    value, point = pull(graph, len(graph.nodes) - 1, zero, interval_lines(graph, intervals(graph, where)), where)
    assert value.tolist() == [[0.0], [0.0]]
    torch.testing.assert_close(point[:, 0], x.double())
