"""Staircases: what they become, and that no proof passes what a model does at their steps, in float32."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import sparring
from sparring.attacks.pgd import PGD
from sparring.certificates.ascent import Ascent
from sparring.certificates.bounds import METHODS, bounds
from sparring.certificates.branch import Effort, certify
from sparring.certificates.crown import crown, crown_ibp, lower_bounds, margins
from sparring.certificates.graph import trace
from sparring.certificates.ibp import intervals
from sparring.certificates.operators import Activation
from sparring.certificates.peeling import peel
from sparring.certificates.region import region
from sparring.certificates.relaxation import bent, relax
from sparring.certificates.rounding import guard
from sparring.core.errors import ModelError
from sparring.core.model import Access
from sparring.core.threat import L2, Linf
from sparring.guards.binarise import Binarise
from sparring.guards.bit_depth import BitDepth
from sparring.guards.jpeg import JPEG
from sparring.models.bpda import bpda
from sparring.models.torch import TorchModel

SHAPE = (1, 3, 3)
ALL = [method for method in METHODS if method != "linear"]
ONE = torch.ones(1, 1, 1, 1)


class Through(nn.Module):
    """Two layers behind a function of the image."""

    def __init__(self, run, seed=0, width=8, gain=3.0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first, self.last = nn.Linear(9, width), nn.Linear(width, 3)
        self.run = run
        with torch.no_grad():
            self.first.weight.mul_(gain)
            self.last.weight.mul_(gain)

    def forward(self, x):
        return self.last(self.first(self.run(x).flatten(1)).relu())


def body(seed, gain=3.0):
    return Through(lambda x: x, seed, gain=gain).eval()


def pixels(count, seed=0, shape=SHAPE):
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


FORMS = {
    "at least": lambda x: (x >= 0.5).to(x.dtype),
    "above": lambda x: (x > 0.5).float(),
    "at most": lambda x: (x <= 0.5).float() * 2,
    "below": lambda x: (x < 0.5).to(x.dtype) - 0.5,
    "of a tensor": lambda x: (torch.full((3, 3), 0.5) < x).float() + (torch.tensor(0.5) >= x).float() / 4,
    "not": lambda x: (~(x > 0.5)).float(),
    "where": lambda x: torch.where(x > 0.5, 2.0, -1.0),
    "choice": lambda x: torch.where(x <= 0.5, torch.tensor([1.0, 2.0, 3.0]), torch.zeros(1)),
    "several": lambda x: (x >= 0.3).float() + (x >= 0.6).float(),
    "round": lambda x: (7 * x).round() / 7,
    "in place": lambda x: (7 * x).round_().div_(7),
    "floor": lambda x: (x * 4).floor(),
    "ceil": lambda x: torch.ceil(4 * x) - 1,
    "trunc": lambda x: (4 * x - 2).trunc(),
    "sign": lambda x: torch.sign(x - 0.5),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_what_torch_computes_on_and_beside_its_steps(form):
    model = TorchModel(Through(FORMS[form]).eval())
    graph = trace(model, SHAPE).graph()
    at = torch.tensor([0.0, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0])  # which float32 holds, as it does their products
    x = at[torch.randint(0, 7, (200, *SHAPE), generator=torch.Generator().manual_seed(1))]
    x = torch.cat([x, pixels(200)])
    torch.testing.assert_close(graph.forward(x.double()).float(), model.query(x, Access.SCORE).logits)
    assert any(node.op.steps for node in graph.nodes if isinstance(node.op, Activation))


@pytest.mark.parametrize(
    ("run", "told"),
    [
        (lambda x: (x >= x.relu()).float(), "one compared with another value"),
        (lambda x: torch.where(x > 0.5, x, 0.0), "one between values"),
        (lambda x: (x == 0.5).float(), "'eq'"),
        (lambda x: torch.logical_not(x).float(), "logical_not"),
        (lambda x: ((x > 0.2) + (x > 0.6)).float(), "torch.bool from 'add'"),  # yes or yes is not two
        (lambda x: x.bool().float(), "torch.bool from '_to_copy'"),
        (lambda x: (x * 255).to(torch.uint8).float(), "torch.uint8"),
        (lambda x: (x > 0.5).int().float(), "torch.int32"),
        (lambda x: x.round(decimals=1), "these options"),
        (lambda x: JPEG(75).transform(x.expand(-1, 3, -1, -1)).mean(1), "no proof"),
    ],
)
def test_what_is_no_staircase_is_refused(run, told):
    with pytest.raises(ModelError, match=told):
        trace(TorchModel(Through(run).eval()), SHAPE)


@pytest.mark.parametrize("kind", ["round", "floor", "ceil", "trunc", "sign", "positive", "nonnegative"])
def test_lines_hold_what_is_between_and_tell_where_nothing_is_left_to_gain(kind):
    op = Activation(kind)
    low = torch.tensor([-2.5, -0.5, -0.4, 0.0, 0.1, 0.5, 1.0], dtype=torch.float64)
    for width in (0.0, 0.3, 0.5, 2.0):
        lines = relax(op, (low, low + width))
        z = low + width * torch.linspace(0, 1, 41, dtype=torch.float64)[:, None]
        assert (op.forward(z) >= lines.low_shift).all()
        assert (op.forward(z) <= lines.high_shift).all()
        torch.testing.assert_close(lines.high_shift - lines.low_shift, op.forward(low + width) - op.forward(low))
        assert torch.equal(bent(op, (low, low + width)), lines.high_shift > lines.low_shift)


def test_the_gradient_goes_straight_through():
    z = torch.tensor([-0.2, 0.4, 1.6], requires_grad=True)
    (gradient,) = torch.autograd.grad((Activation("round").forward(z) * torch.tensor([1.0, 2.0, 3.0])).sum(), z)
    torch.testing.assert_close(gradient, torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(Activation("round").forward(z).detach(), torch.tensor([-0.0, 0.0, 2.0]))


def every_answer(show, x, threat):
    """Each row's (k, *shape) images of what `show` makes of some legal image: all corners of what can flip.

    Found by asking it about every pixel by itself: at the ends, and closely in between.
    """
    steps = torch.linspace(-1, 1, 401).view(-1, 1, 1, 1)
    for row in x:
        seen = show(threat.project(row + threat.eps * steps, row.expand(401, *row.shape))).flatten(1)
        values = [seen[:, i].unique().tolist() for i in range(seen.shape[1])]
        yield torch.tensor(list(itertools.product(*values))).view(-1, *row.shape)


GUARDS = {
    "binarise": (Binarise(), Linf(0.2)),
    "another threshold": (Binarise(0.3), Linf(0.2)),
    "bit depth": (BitDepth(2), Linf(0.1)),
    "several levels": (BitDepth(3), Linf(0.075)),
}


@pytest.mark.parametrize("name", GUARDS)
def test_no_corner_of_what_can_flip_passes_a_bound(name):
    shield, threat = GUARDS[name]
    net, x = body(0), pixels(400, 1)
    model = shield.adaptive(net)
    best = model.query(x, Access.SCORE).logits.topk(2, 1)
    near = (best.values[:, 0] - best.values[:, 1]).argsort()[::16]  # and far from another label
    x, y = x[near], best.indices[near, 0]
    answers = list(every_answer(shield.transform, x, threat))
    assert max(len(a) for a in answers) >= 64
    ask = margins(trace(model, SHAPE).graph(), y, x.double())
    with torch.no_grad():
        least = torch.stack([(net(a).double() @ m.T).amin(0) for a, m in zip(answers, ask, strict=True)])
    for method in ALL:
        found = bounds(model, x, y, threat, method, ascent=Ascent(10, deep=3))
        assert (found.lower <= least + found.guard).all()
        assert not (found.certified & (least <= 0).any(1)).any()
        assert found.certified.any() or method in ("ibp", "crown-ibp")
        assert threat.contains(found.worst, x).all()
    searched = certify(model, x, y, threat)
    assert torch.equal(searched.certified, (least > 0).all(1))  # no value between the steps does worse here
    assert torch.equal(searched.broken, (least <= 0).any(1))
    assert 0 < searched.certified.sum() < 25
    labels = model.query(searched.worst[searched.broken], Access.DECISION).labels
    assert (labels != y[searched.broken]).all()
    assert threat.contains(searched.worst, x).all()


@pytest.mark.parametrize("threat", [Linf(0.15), L2(0.3)], ids=lambda t: t.norm)
@pytest.mark.parametrize("form", ["at least", "below", "floor"])
def test_behind_a_staircase_the_bound_of_a_linear_net_is_met(form, threat):
    net, x = nn.Sequential(nn.Flatten(), body(0).first, nn.Linear(8, 3, bias=False)).eval(), pixels(3)
    with torch.no_grad():
        net[2].weight.copy_(body(1).last.weight)
    y = torch.arange(3)
    shown = FORMS[form]
    model = TorchModel(lambda x: net(shown(x)))
    ask = margins(trace(model, SHAPE).graph(), y, x.double())
    answers = every_answer(shown, x, Linf(threat.eps))  # and of a ball the box around it
    with torch.no_grad():
        least = torch.stack([(net(a).double() @ m.T).amin(0) for a, m in zip(answers, ask, strict=True)])
    for method in ALL:
        found = bounds(model, x, y, threat, method)
        torch.testing.assert_close(found.lower, least, rtol=0, atol=1e-5)
        assert threat.contains(found.worst, x).all()
        if threat.norm == "linf":
            met = torch.einsum("nk,nsk->ns", model.query(found.worst, Access.SCORE).logits.double(), ask)
            torch.testing.assert_close(met.amin(1), least.amin(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.3])
def test_a_pixel_flips_exactly_if_eps_carries_it_over_the_threshold(eps):
    """To a millionth, which the judge allows as slack."""
    graph = trace(Binarise().adaptive(body(0)), SHAPE).graph()
    border = torch.tensor([0.5 - eps, 0.5 + eps])
    for away, flips in ((0.0, True), (5e-7, True), (1e-5, False), (0.05, False)):
        x = torch.stack([border[0] - away, border[1] + away]).view(2, 1, 1, 1).expand(2, *SHAPE)
        found = peel(graph, region(Linf(eps), x)).region
        assert torch.equal(found.high > found.low, torch.full((2, *SHAPE), flips, dtype=torch.bool))
        if not flips:
            assert torch.equal(found.low, Binarise().transform(x).double())


def test_black_stays_clear_of_the_step_that_begins_at_it():
    """Where nothing is rounded, nothing is added: else every black pixel would have two values."""
    graph = trace(TorchModel(Through(FORMS["floor"]).eval()), SHAPE).graph()
    found = peel(graph, region(Linf(0.1), torch.zeros(1, *SHAPE))).region
    assert not found.low.any()
    assert not found.high.any()


FAR = {  # what float32 makes of a pixel here is coarser than the slack by far, so that only the rounding explains it
    "threshold": lambda x: (x + 1000 >= 1000.5).float(),
    "upside down": lambda x: (1000.5 - (x + 1000) > 0.25).float(),
    "levels": lambda x: ((x + 4000) * 0.7).round(),
    "behind a layer": lambda x: (nn.functional.conv2d(x, ONE.to(x), 999.5 * ONE[0, 0, 0].to(x)) >= 1000).float(),
    "two tests": lambda x: (x + 1000 >= 1000.25).float() + (x + 1000 > 1000.75).float(),
}


@pytest.mark.parametrize("form", FAR)
@pytest.mark.parametrize("method", [*ALL, "branch"])
def test_a_step_within_float32_of_a_pixel_counts_as_both(form, method):
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2)).eval()
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        net[1].bias.copy_(torch.tensor([-0.5, 0.5]) if form != "levels" else torch.tensor([-2800.5, 2800.5]))
    shown = FAR[form]
    model = TorchModel(lambda x: net(shown(x)))
    x = (torch.arange(2**16) / 2**16).view(-1, 1, 1, 1)
    exact = shown(x.double())
    off = (shown(x).double() != exact).view(-1)
    assert off.sum() > 0  # what exact arithmetic alone would get wrong
    near = (off.nonzero() + torch.arange(-1000, 1001, 100)).clamp(0, 2**16 - 1).unique()
    x, exact = x[near], exact[near]
    with torch.no_grad():
        y = net.double()(exact.double()).argmax(1)
        net.float()
    labels = model.query(x, Access.DECISION).labels
    assert (labels != y).any()
    found = certify(model, x, y, Linf(0.0)) if method == "branch" else bounds(model, x, y, Linf(0.0), method)
    assert not (found.certified & (labels != y)).any()
    assert found.certified.any()


SHORT = Effort(root=Ascent(4, deep=2), climb=Ascent(2), candidates=1, most=4)


class Deep(nn.Module):
    """Steps between the layers, on the arguments of other activations, and on the image beside the image itself."""

    def __init__(self, kind, seed):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv, self.second = nn.Conv2d(1, 3, 2), nn.Conv2d(3, 3, 2)
            self.few, self.last, self.shared = nn.Linear(3, 3), nn.Linear(27, 3), nn.Linear(9, 4)
            self.both = nn.Linear(24, 3)
        self.kind = kind
        with torch.no_grad():
            for part in (self.conv, self.second, self.few, self.last, self.shared, self.both):
                part.weight.mul_(2.0)

    def forward(self, x):
        if self.kind == "between":
            h = ((20 * self.conv(x)).round() / 20).relu()
            return self.few((self.second(h) > 0.2).float().flatten(1))
        if self.kind == "in windows":
            h = (self.conv(x) * 4).floor() / 4
            return self.few(self.second(h).relu().flatten(1))
        if self.kind == "shared":
            z = self.shared(x.flatten(1))
            parts = [z.relu(), z.sigmoid(), (z >= 0.1).float(), z.round(), z.tanh(), z]
            return self.both(torch.cat(parts, 1))
        return self.last(torch.cat([x, (x >= 0.5).float(), (3 * x).round()], 1).flatten(1))


@pytest.mark.parametrize("kind", ["between", "in windows", "shared", "beside"])
@pytest.mark.parametrize("threat", [Linf(0.08), L2(0.15)], ids=lambda t: t.norm)
def test_no_point_passes_a_bound_where_steps_lie_within_the_net(kind, threat):
    some = 0
    for seed in range(2):
        net, x = Deep(kind, seed).eval(), pixels(12, seed)
        model = TorchModel(net)
        y = model.query(x, Access.DECISION).labels
        tried = torch.stack([threat.project(x + way * 0.1, x) for way in torch.randn(300, 12, *SHAPE).unbind()])
        out = [sparring.attack(TorchModel(_softly(net)), x, y, PGD(steps=20), threat).best[None]]
        tried = torch.cat([tried, *out, x[None]])
        logits = model.query(tried.flatten(0, 1), Access.SCORE).logits.double().view(len(tried), 12, 3)
        ask = margins(trace(model, SHAPE).graph(), y, x.double())
        seen = torch.einsum("mnk,nsk->mns", logits, ask).amin(0)
        for method in ALL:
            found = bounds(model, x, y, threat, method, ascent=Ascent(5, deep=2))
            assert (found.lower - found.guard <= seen + 1e-9).all(), method
            some += int(found.certified.sum())
        searched = certify(model, x, y, threat, effort=SHORT)
        assert not (searched.certified & (seen <= 0).any(1)).any()
        labels = model.query(searched.worst, Access.DECISION).labels
        assert torch.equal(labels != y, searched.broken)
    assert some > 0


def _softly(net):
    """The same answers, with gradients that a search can use."""

    def scores(x):
        return TorchModel(net).query(x, Access.SCORE).logits

    first = nn.Linear(9, 3)
    return bpda(scores, lambda x: first(x.flatten(1)))


def test_relu_and_another_function_of_the_same_value_each_have_their_own_lines():
    """By enumeration of a grid: once, branch and bound took the lines of the one for the other."""
    grid = torch.linspace(-0.3, 0.3, 31)
    grid = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1).view(1, -1, 1, 1, 2)
    proved = 0
    for seed in range(12):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            first, last = nn.Linear(2, 3), nn.Linear(6, 2)
        with torch.no_grad():
            first.weight.mul_(3)
            last.weight.mul_(3)

        def scores(x, first=first, last=last):
            z = first(x.flatten(1))
            return last(torch.cat([z.relu(), z.sigmoid()], 1))

        model, x = TorchModel(scores), pixels(20, seed, (1, 1, 2))
        y = model.query(x, Access.DECISION).labels
        found = certify(model, x, y, Linf(0.3))
        near = (x[:, None] + grid).clamp(0, 1).flatten(0, 1)
        held = (model.query(near, Access.DECISION).labels.view(20, -1) == y[:, None]).all(1)
        assert not (found.certified & ~held).any()
        proved += int(found.certified.sum())
    assert proved > 20


SHOWN = {
    "binarise": (Binarise().transform, True),
    "bit depth": (BitDepth(3).transform, True),
    "upside down": (lambda x: (x <= 0.6).float() * 2, True),
    "flat": (lambda x: (x.flatten(1) * 3).floor(), True),
    "normalised": (lambda x: ((x - torch.tensor([0.3])) / torch.tensor([-0.5])).round(), True),
    "two of them": (FORMS["several"], False),
    "beside": (lambda x: x + x.round(), False),
    "of sums": (lambda x: nn.functional.avg_pool2d(x, 2, 1, padding=1)[:, :, :3, :3].round(), False),
    "smooth": (lambda x: 2 * x, False),
}  # fmt: skip


@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.parametrize("threat", [Linf(0.2), L2(0.5)], ids=lambda t: t.norm)
def test_what_is_peeled_off_is_the_box_of_its_answers_and_gives_images_for_them(name, threat):
    shown, comes_off = SHOWN[name]
    x = pixels(20)
    graph, where = trace(TorchModel(Through(shown).eval()), SHAPE).graph(), region(threat, x)
    peeled = peel(graph, where)
    assert (len(peeled.graph.nodes) < len(graph.nodes)) is comes_off
    if not comes_off:
        assert peeled.graph is graph
        assert peeled.region is where
        return
    inner = peeled.region
    y, rows = torch.arange(20) % 3, torch.arange(20).flip(0)
    values = inner.low + (inner.high - inner.low) * pixels(20, 1, inner.low.shape[1:])
    images = peeled.images(values[rows], rows)
    assert (images >= where.low[rows]).all()
    assert (images <= where.high[rows]).all()
    assert not any(isinstance(node.op, Activation) and node.op.steps for node in peeled.graph.nodes)
    torch.testing.assert_close(graph.forward(images), peeled.graph.forward(values[rows].round()))
    assert torch.equal(images == where.x[rows], values[rows].round().view_as(images) == inner.x[rows].view_as(images))
    for relaxed, behind in ((crown_ibp(graph, where), crown_ibp(peeled.graph, inner)),
                            (crown(graph, where), crown(peeled.graph, inner))):  # fmt: skip
        one, _ = lower_bounds(graph, y, relaxed.lines, where)
        two, _ = lower_bounds(peeled.graph, y, behind.lines, inner)
        torch.testing.assert_close(one, two)
        spare = [guard(g, r.bounds, y, 2.0**-24) for g, r in ((graph, relaxed), (peeled.graph, behind))]
        torch.testing.assert_close(*spare)


def test_a_net_that_is_trained_through_a_staircase_gets_gradients_behind_it():
    net = body(0)
    traced = trace(Binarise().adaptive(net), SHAPE)
    found = intervals(traced.graph(trainable=True), region(Linf(0.1), pixels(2)))
    (gradient,) = torch.autograd.grad(found[max(found)][0].sum(), net.first.weight)
    assert gradient.abs().sum() > 0
