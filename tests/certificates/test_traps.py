"""Where a model does not do what exact arithmetic on its list of operations does: each once gave a false proof."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparring.auditing.provers import provable
from sparring.certificates.ascent import Ascent
from sparring.certificates.bounds import METHODS, bounds
from sparring.certificates.branch import certify
from sparring.certificates.graph import trace
from sparring.certificates.rounding import logit_error, unit
from sparring.core.errors import ModelError
from sparring.core.model import Access
from sparring.core.threat import L2, Linf
from sparring.models.torch import TorchModel

ALL = [method for method in METHODS if method != "linear"]
BIG = torch.tensor([100.0, 100.0])  # makes the comparison of a trace with its model blind to small differences


class Net(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run = run

    def forward(self, x):
        return self.run(x)


def proved(run, x, label, threat):
    """Which methods say that `run` gives all images `x` (n, c, h, w) the `label` everywhere in `threat`."""
    model = TorchModel(Net(run), bounds=threat.bounds)
    y = torch.full((len(x),), label)
    found = [m for m in ALL if bounds(model, x, y, threat, m, ascent=Ascent(steps=2, deep=1)).certified.any()]
    return found + ["branch"] * bool(certify(model, x, y, threat).certified.any())


def labels(run, x):
    return TorchModel(Net(run)).query(x, Access.DECISION).labels.tolist()


def pair(first, second):
    return torch.cat([first, second], 1)


@pytest.fixture
def precision():
    """Puts back what torch may compute products in."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("kind", ["high", "medium"])
def test_many_terms_in_coarse_arithmetic_have_no_negative_guard(kind, precision):
    """Once gamma_k, k u / (1 - k u), was taken where k u is above one: the default on CUDA, from 2,048 inputs on."""
    torch.manual_seed(0)
    model = TorchModel(nn.Sequential(nn.Flatten(), nn.Linear(2100, 2)).eval())
    x = torch.rand(4, 1, 30, 70)
    y = model.query(x, Access.DECISION).labels
    precision(kind)
    found = bounds(model, x, y, Linf(0.3), "crown")
    assert (found.guard > 0).all()
    assert (found.lower < 0).all()
    assert not found.certified.any()
    assert not certify(model, x, y, Linf(0.3)).certified.any()
    assert (bounds(model, x, y, Linf(0.0), "crown").guard < 2.0).all()  # nor one that forbids every proof


def test_gamma_of_shortened_factors_is_that_of_two_factors_and_a_sum_in_float32():
    """The worst case itself: all factors just short of the next number of the coarse format, cut off one by one."""
    k, short = 1000, 2.0**-10  # tf32 holds ten bits, and hardware may cut off: then a factor loses up to 2^-10
    factor = torch.full((k,), 1 + short * (1 - 2.0**-10), dtype=torch.float64)
    cut = (factor / short).floor() * short
    net = nn.Linear(k, 2, bias=False).eval()
    with torch.no_grad():
        net.weight.copy_(factor.expand(2, k))
    graph = trace(TorchModel(nn.Sequential(nn.Flatten(), net)), (1, 1, k)).graph()
    x = factor.view(1, 1, 1, k) / 2
    error = logit_error(graph, {0: (x, x), 1: (x.flatten(1),) * 2}, 2.0**-11)
    off = float(factor @ factor / 2 - cut @ cut / 2)
    assert off <= float(error[0, 0]) <= 1.2 * off + 2 * k * k * 2.0**-23


def test_where_all_terms_together_round_by_more_than_one_nothing_is_known():
    graph = trace(TorchModel(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()), (1, 2, 2)).graph()
    x = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
    assert logit_error(graph, {0: (x, x), 1: (x.flatten(1),) * 2}, 0.25).isinf().all()


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch before 2.9 has no such switch")
def test_the_unit_follows_the_newer_switch_of_convolutions_too():
    on = torch.backends.mkldnn.conv
    before = on.fp32_precision
    try:
        on.fp32_precision = "bf16"
        assert unit(torch.device("cpu")) == 2.0**-8
    finally:
        on.fp32_precision = before
    assert unit(torch.device("cpu")) == 2.0**-24


def test_what_is_written_through_a_view_is_not_passed_over():
    def run(x):
        h = x.clone()
        h[:, :, :, 0].clamp_(max=0.99)
        h = h.flatten(1)
        return pair(h[:, :1], h[:, :1] * 0 + 0.993)

    x = torch.tensor([[[[0.999, 0.5]]]])
    assert labels(run, x) == [1]
    with pytest.raises(ModelError, match="no proof"):
        proved(run, x, 0, Linf(0.001))


def test_a_view_taken_before_its_base_is_written_to_holds_what_was_written():
    def run(x):
        h = F.linear(x.flatten(1), torch.eye(2))
        view = h[:, :1]
        h.clamp_(max=0.992)
        return pair(view, h[:, 1:] * 0 + 0.995)

    x = torch.tensor([[[[0.999, 0.5]]]])
    assert labels(run, x) == [1]
    assert proved(run, x, 0, Linf(0.001)) == []
    assert proved(run, x, 1, Linf(0.001)) == [*ALL, "branch"]


def test_a_product_that_float32_loses_is_no_proof():
    def run(x):
        h = x.flatten(1) * 1e-30 * 1e-30 * 1e30 * 1e30
        return pair(h[:, 1:] * 0 + 0.2, h[:, :1]) + BIG

    x = torch.full((1, 1, 1, 2), 0.5)
    assert labels(run, x) == [0]  # though 0.5 is more than 0.2
    assert proved(run, x, 1, Linf(0.1)) == []


def test_a_sum_that_float32_cannot_hold_is_no_proof():
    def run(x):
        h = (x.flatten(1) - 0.95).relu() * 1e30 * 1e10 * 1e-30 * 1e-10
        return pair(h[:, 1:], x.flatten(1)[:, :1] * 0 + 1)

    x = torch.full((1, 1, 1, 2), 0.4)
    assert labels(run, torch.full_like(x, 0.99)) == [0]
    assert proved(run, x, 1, Linf(0.6)) == []


def test_constants_are_those_that_the_model_finds_in_float32():
    weight, large = nn.Parameter(torch.tensor([1.0])), torch.tensor([1e8])

    def run(x):
        constant = (weight * 0.5 + large) - large  # 0 in float32, 0.5 in float64
        h = x.flatten(1)
        return pair(h[:, 1:] * 0 + 0.2, h[:, :1] * 0.01 + constant) + BIG

    x = torch.full((1, 1, 1, 2), 0.5)
    assert labels(run, x) == [0]
    assert proved(run, x, 1, Linf(0.1)) == []
    assert proved(run, x, 0, Linf(0.1)) == [*ALL, "branch"]


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 0.001
        return x.flatten(1)[:, :2] + self.calls


@pytest.mark.parametrize(
    ("run", "told"),
    [
        (lambda x: x.flatten(1) + 1e-6 * torch.randn(1, 1), "without noise"),
        (lambda x: F.avg_pool2d(x, 1, divisor_override=-4).flatten(1), "positive divisor"),
        (lambda x: F.pad(x, (0, 0, 0, 0, 0, 0, 1, -1)).flatten(1), "rows that do not mix"),
        (lambda x: torch.maximum(x, torch.tensor(0.3)).flatten(1), "maximum"),
        (lambda x: (x * 1e-40 * 1e40).flatten(1) * 1e-5, "float32 can hold"),
        (Counting(), "keeps state"),
    ],
)
def test_what_no_bound_covers_is_refused(run, told):
    with pytest.raises(ModelError, match=told):
        trace(TorchModel(run if isinstance(run, nn.Module) else Net(run)), (1, 1, 2))


CHAINS = {
    "sigmoid of relu": lambda x: (x - 0.5).relu().sigmoid(),
    "tanh of sigmoid": lambda x: (3 * x).sigmoid().tanh(),
    "relu of tanh": lambda x: (x - 0.5).tanh().relu(),
    "floor of relu": lambda x: (3 * x - 1).relu().floor(),
}


@pytest.mark.parametrize("threat", [Linf(0.2), L2(0.3)], ids=str)
@pytest.mark.parametrize("name", sorted(CHAINS))
def test_an_activation_of_an_activation_has_bounds(name, threat):
    """Once, CROWN asked for lines that it had not drawn yet."""
    weight = torch.tensor([[1.0, -2.0], [-1.5, 0.5]])
    model = TorchModel(Net(lambda x: F.linear(CHAINS[name](F.linear(x.flatten(1), weight)), weight)))
    x = torch.tensor([[[[0.6, 0.3]]], [[[0.2, 0.9]]]])
    y = model.query(x, Access.DECISION).labels
    grid = torch.linspace(0, 1, 101)
    points = torch.cartesian_prod(grid, grid).view(-1, 1, 1, 2)
    for row in range(2):
        here = points[threat.contains(points, x[row].expand_as(points))]
        logits = model.query(here, Access.SCORE).logits
        least = float((logits[:, y[row]] - logits[:, 1 - y[row]]).min())
        for method in ALL:
            found = bounds(model, x[row, None], y[row, None], threat, method, ascent=Ascent(steps=2, deep=1))
            assert float((found.lower - found.guard).min()) <= least, method
        assert float(certify(model, x[row, None], y[row, None], threat).lower) <= least


def test_the_ends_of_the_pixels_are_those_that_float32_knows():
    high = 0.99999999
    threat = Linf(0.5, (0.0, high))
    x = torch.tensor([[[[0.7, 0.5]]]])
    white = torch.ones_like(x)
    assert threat.contains(white, x).all()  # float32 has no number between
    run = lambda x: pair(x.flatten(1)[:, :1].floor(), x.flatten(1)[:, :1] * 0 + 0.5)  # noqa: E731  # as all here
    assert labels(run, white) == [0]
    assert proved(run, x, 1, threat) == []


@pytest.mark.parametrize(
    "show",
    [lambda x: x[:, :1], lambda x: x[:, :1].permute(0, 2, 3, 1), lambda x: F.max_pool2d(x[:, :1], (1, 2))],
    ids=["cut", "cut and turned", "pooled"],
)
def test_a_step_at_the_end_of_a_range_is_not_lost_in_float64(show):
    """The middle less the reach lies beside the end, by the last bit: enough to answer 0 in place of -1."""
    run = lambda x: pair(-show(x).ceil().flatten(1)[:, :1], x.flatten(1)[:, 3:] * 0 + 0.5)  # noqa: E731
    x = torch.rand(4000, 2, 1, 1, generator=torch.Generator().manual_seed(0)) * 0.4 + 19.8
    x = x.repeat(1, 1, 1, 2)
    threat = Linf(43.5, (-1.0, 255.0))
    high = x[:, 0, 0, 0].double() + (threat.eps + threat.slack)
    x = x[((high - 1) / 2 - (high + 1) / 2) > -1][:8]
    assert len(x) == 8
    lowest = torch.full_like(x, -1.0)
    assert threat.contains(lowest, x).all()
    assert set(labels(run, lowest)) == {0}
    assert proved(run, x, 1, threat) == []


def test_black_of_a_cut_image_stays_clear_of_the_step_that_begins_at_it():
    """What is only moved is exact at its ends: nothing is added there."""

    def run(x):
        return pair(x[:, :1].sign().flatten(1) + 0.5, x[:, 1:].flatten(1) * 0)

    x = torch.tensor([[[[0.05]], [[0.5]]]])
    for threat in (Linf(0.1), L2(0.1)):
        assert proved(run, x, 0, threat) == [*ALL, "branch"]


def test_who_hears_of_a_search_hears_of_images_also_behind_a_staircase():
    """Once the levels of a flattened image came, which fit no image."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 3))
    model = TorchModel(Net(lambda x: 9 * body((x.flatten(1) * 7).round() / 7)))
    x, threat = torch.rand(8, 1, 3, 3), Linf(0.3)
    y = model.query(x, Access.DECISION).labels
    found = provable(model, threat, (1, 3, 3), "cpu").prove("branch", x, y, threat, nodes=1)
    assert found.worst.shape == x.shape
    assert threat.contains(found.worst, x).all()
    assert found.broken.any()
    assert (model.query(found.worst, Access.DECISION).labels != y)[found.broken].all()
    assert math.isfinite(float(found.lower[found.broken].min()))
