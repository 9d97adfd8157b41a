"""Nothing in the set passes a bound: random points, corners and points found by descent, on every kind of layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import nn

from sparring.certificates.alpha import ascend
from sparring.certificates.ascent import Ascent
from sparring.certificates.bounds import bounds
from sparring.certificates.crown import crown, crown_ibp, interval_lines, lower_bounds, margins
from sparring.certificates.graph import trace
from sparring.certificates.region import region
from sparring.core.threat import L2, Linf
from sparring.models.torch import TorchModel

NORM = {"mean": (0.3, 0.4), "std": (0.5, 0.8)}
each_threat = pytest.mark.parametrize(
    "threat", [Linf(0.02), Linf(0.15), L2(0.1), L2(0.8)], ids=lambda t: t.describe()
)


def points(graph, x, y, threat, count=60):
    """(n, m, ...) points of the threat model: random ones, corners, and the ends of descents of each margin."""
    generator = torch.Generator().manual_seed(1)
    n = len(x)
    start = x.repeat_interleave(count, 0)
    noise = torch.randn(start.shape, generator=generator)
    noise = torch.where(torch.rand(len(start), 1, 1, 1, generator=generator) < 0.5, noise.sign(), noise)
    reach = threat.eps if threat.norm == "linf" else threat.eps / noise[0].numel() ** 0.5
    shrink = torch.rand(len(start), 1, 1, 1, generator=generator).clamp_min(0.5) * 2 - 1
    at = threat.project(start + 3 * noise * reach * shrink.abs(), start)
    found = [at]
    ask = margins(graph, y, x.double()).repeat_interleave(count, 0)
    which = torch.arange(len(at)) % ask.shape[1]
    for step in (0.5, 0.5, 0.25, 0.25, 0.1, 0.05):
        leaf = at.double().requires_grad_()
        value = (graph.forward(leaf) * ask[torch.arange(len(at)), which]).sum()
        (gradient,) = torch.autograd.grad(value, leaf)
        at = threat.project(at - 2 * step * threat.eps * threat.steepest(gradient.float()), start)
        found.append(at)
    assert threat.contains(at, start).all()
    return torch.cat([f.view(n, count, *x.shape[1:]) for f in found], 1)


@each_threat
def test_no_point_passes_a_bound(name, threat, make, images, graph_of):
    graph, (x, y) = graph_of(make(name)), images(4)
    where = region(threat, x)
    tried = points(graph, x, y, threat).double()
    values = [tried.flatten(0, 1)]
    for node in graph.nodes[1:]:
        values.append(node.op.forward(*(values[i] for i in node.inputs)))
    ask = margins(graph, y, where.low)
    seen = torch.einsum("nmk,nsk->nsm", values[-1].view(*tried.shape[:2], -1), ask).amin(2)
    plain = crown(graph, where)
    deep = crown(graph, where, known=plain.bounds, ascent=Ascent(deep=3))
    for relaxed in (crown_ibp(graph, where), plain, deep):
        for at, (low, high) in relaxed.bounds.items():
            here = values[at].view(*tried.shape[:2], *low.shape[1:])
            assert (here >= low[:, None] - 1e-9).all(), at
            assert (here <= high[:, None] + 1e-9).all(), at
        for lines in (relaxed.lines, interval_lines(graph, relaxed.bounds)):
            assert (lower_bounds(graph, y, lines, where)[0] <= seen + 1e-9).all()
        climbed, _ = ascend(graph, len(graph.nodes) - 1, ask, relaxed.lines, where, Ascent(), 5)
        assert (climbed <= seen + 1e-9).all()
        assert (climbed >= lower_bounds(graph, y, relaxed.lines, where)[0]).all()


@pytest.mark.parametrize("seed", range(4))
def test_bounds_close_on_the_point_as_the_ball_shrinks(name, seed, make, images, graph_of):
    graph, (x, y) = graph_of(make(name, seed)), images(3, seed)
    exact = torch.einsum("nk,nsk->ns", graph.forward(x.double()), margins(graph, y, x.double()))
    for threat in (Linf(0.0), L2(0.0)):
        where = region(threat, x)
        lower, point = lower_bounds(graph, y, crown(graph, where).lines, where)
        torch.testing.assert_close(lower, exact, rtol=0, atol=2e-3)  # the slack of 1e-6 is still inside
        assert (lower <= exact).all()
        assert (threat.distance(point[:, 0], x) <= threat.slack + 1e-12).all()


def exact_minimum(weights, low, high, ask):
    """The least ask . net(x) over a box: the least over the linear programmes of all patterns of a ReLU net."""
    first, bias, last, end = weights
    best = np.inf
    for pattern in range(2 ** len(bias)):
        on = np.array([pattern >> i & 1 for i in range(len(bias))], dtype=bool)
        rows = np.where(on[:, None], -first, first)
        objective = (ask @ last[:, on]) @ first[on]
        found = linprog(objective, rows, np.where(on, bias, -bias), bounds=np.stack([low, high], 1), method="highs")
        if found.status == 0:
            best = min(best, found.fun + ask @ (last[:, on] @ bias[on] + end))
    return best


@pytest.mark.parametrize("seed", range(4))
def test_the_exact_minimum_of_a_tiny_net_is_never_passed(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    with torch.no_grad():
        for layer in (net[1], net[3]):
            layer.weight.mul_(3)
    graph = trace(TorchModel(net), (1, 2, 2)).graph()
    x, y = torch.rand(1, 1, 2, 2), torch.tensor([seed % 3])
    weights = [t.detach().double().numpy() for t in (net[1].weight, net[1].bias, net[3].weight, net[3].bias)]
    tight = 0
    for eps in (0.002, 0.05, 0.2, 0.6):
        where = region(Linf(eps), x)
        ask = margins(graph, y, where.low)
        low, high = where.low.flatten().numpy(), where.high.flatten().numpy()
        exact = np.array([exact_minimum(weights, low, high, a.numpy()) for a in ask[0]])
        relaxed = crown(graph, where)
        for lower in (
            lower_bounds(graph, y, crown_ibp(graph, where).lines, where)[0],
            lower_bounds(graph, y, relaxed.lines, where)[0],
            ascend(graph, len(graph.nodes) - 1, ask, relaxed.lines, where, Ascent(), 40)[0],
        ):
            assert (lower[0].detach().numpy() <= exact + 1e-7).all()
        tight += int((np.abs(lower[0].detach().numpy() - exact) < 1e-6).sum())
    assert tight >= 1  # and where the ball is small it is met


@pytest.mark.parametrize("threat", [Linf(0.01), L2(0.05)], ids=lambda t: t.norm)
def test_what_is_certified_withstands_the_model_in_float32(name, threat, make, images):
    net, (x, _) = make(name), images(12)
    model = TorchModel(net, **NORM)
    y = model.query(x, 0).labels
    graph = trace(model, x.shape[1:]).graph()
    for method in ("ibp", "crown-ibp", "crown", "alpha-crown"):
        proved = bounds(model, x, y, threat, method, ascent=Ascent(3, deep=2))
        tried = points(graph, x, y, threat, 20)
        labels = model.query(tried.flatten(0, 1), 0).labels.view(12, -1)
        assert (labels == y[:, None]).all(1)[proved.certified].all()
        assert threat.contains(proved.worst, x).all()
    assert proved.certified.any()
