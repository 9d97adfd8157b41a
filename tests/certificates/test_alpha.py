"""Alpha-CROWN against the linear programme of the triangle relaxation, which is its optimum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import nn

from sparring.certificates.alpha import ascend
from sparring.certificates.ascent import Ascent
from sparring.certificates.crown import crown, lower_bounds, margins
from sparring.certificates.graph import trace
from sparring.certificates.region import region
from sparring.core.threat import Linf
from sparring.models.torch import TorchModel


def triangle(first, bias, last, end, low, high, bounds, ask):
    """Min ask . (last h + end), x in the box, h between z, 0 and the chord, z = first x + bias (Ehlers 2017)."""
    left, right = bounds
    d, k = first.shape[1], len(bias)
    rows, ends = [np.hstack([first, -np.eye(k)])], [-bias]  # z <= h
    limits = [*zip(low, high, strict=True)]
    for i in range(k):
        if right[i] <= 0:
            limits.append((0, 0))
        elif left[i] >= 0:
            rows.append(np.hstack([-first[i], np.eye(k)[i]])[None])
            ends.append(bias[i : i + 1])
            limits.append((None, None))
        else:
            slope = right[i] / (right[i] - left[i])
            rows.append(np.hstack([-slope * first[i], np.eye(k)[i]])[None])
            ends.append(np.array([slope * (bias[i] - left[i])]))
            limits.append((0, None))
    off = right <= 0
    rows[0], ends[0] = rows[0][~off], ends[0][~off]
    goal = np.concatenate([np.zeros(d), ask @ last])
    found = linprog(goal, np.vstack(rows), np.concatenate(ends), bounds=limits, method="highs")
    assert found.status == 0
    return found.fun + ask @ end


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("eps", [0.05, 0.15])
def test_the_optimum_is_that_of_the_linear_programme(seed, eps):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 4)).eval()
    with torch.no_grad():
        net[1].weight.mul_(2)
    x, y = torch.rand(2, 1, 3, 3), torch.tensor([seed % 4, (seed + 1) % 4])
    graph, where = trace(TorchModel(net), (1, 3, 3)).graph(), region(Linf(eps), x)
    relaxed, ask = crown(graph, where), margins(graph, y, where.low)
    plain, _ = lower_bounds(graph, y, relaxed.lines, where)
    found, _ = ascend(graph, len(graph.nodes) - 1, ask, relaxed.lines, where, Ascent(rate=0.1, decay=0.98), 300)
    weights = [t.detach().double().numpy() for t in (net[1].weight, net[1].bias, net[3].weight, net[3].bias)]
    at = graph.nodes[graph.activations()[0]].inputs[0]
    gained = 0
    for i in range(len(x)):
        box = [end[i].flatten().numpy() for end in (where.low, where.high)]
        arguments = [end[i].numpy() for end in relaxed.bounds[at]]
        for j, a in enumerate(ask[i].numpy()):
            optimum = triangle(*weights, *box, arguments, a)
            assert found[i, j] <= optimum + 1e-7
            assert found[i, j] >= optimum - 1e-3
            gained += int(optimum > plain[i, j] + 1e-3)
    assert gained or eps == 0.05  # else there was nothing to climb


@pytest.mark.parametrize("seed", range(3))
def test_the_bounds_of_arguments_climb_to_the_linear_programme_too(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    with torch.no_grad():
        net[1].weight.mul_(2)
    graph, where = trace(TorchModel(net), (1, 3, 3)).graph(), region(Linf(0.2), torch.rand(2, 1, 3, 3))
    deep = crown(graph, where, ascent=Ascent(rate=0.1, decay=0.98, deep=300))
    weights = [t.detach().double().numpy() for t in (net[1].weight, net[1].bias, net[3].weight, net[3].bias)]
    first, second = (graph.nodes[at].inputs[0] for at in graph.activations())
    checked = 0
    for i in range(2):
        box = [end[i].flatten().numpy() for end in (where.low, where.high)]
        arguments = [end[i].numpy() for end in deep.bounds[first]]
        low, high = (end[i].numpy() for end in deep.bounds[second])
        for k in ((low < 0) & (high > 0)).nonzero()[0]:
            one = np.eye(6)[k]
            assert low[k] == pytest.approx(triangle(*weights, *box, arguments, one), abs=1e-3)
            assert high[k] == pytest.approx(-triangle(*weights, *box, arguments, -one), abs=1e-3)
            checked += 1
    assert checked


def test_the_ascent_ends_when_it_is_enough(make, images, graph_of):
    graph, (x, y) = graph_of(make("conv")), images(3)
    where = region(Linf(0.05), x)
    relaxed, ask = crown(graph, where), margins(graph, y, where.low)
    told = []

    def enough(best):
        told.append(best)
        return torch.full_like(best, len(told) >= 3, dtype=torch.bool)

    ascend(graph, len(graph.nodes) - 1, ask, relaxed.lines, where, Ascent(), 50, enough)
    assert len(told) == 3
    assert (told[-1] >= told[0]).all()
