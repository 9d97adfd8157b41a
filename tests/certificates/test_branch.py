"""Branch and bound against mixed-integer programming: both sides of the boundary, on every kind of layer."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sparring.certificates import search
from sparring.certificates.branch import BROKEN, OPEN, PROVED, Effort, Question, certify, decide
from sparring.certificates.branching import choose
from sparring.certificates.crown import crown, margins
from sparring.certificates.frontier import Frontier
from sparring.certificates.graph import trace
from sparring.certificates.region import region
from sparring.certificates.rounding import logit_error, unit
from sparring.certificates.subproblem import BETA, Frame, Stem, children
from sparring.core.errors import UsageError
from sparring.core.threat import L2, Linf
from sparring.models.torch import TorchModel

_spec = importlib.util.spec_from_file_location("exact", Path(__file__).with_name("exact.py"))
assert _spec is not None
exact = importlib.util.module_from_spec(_spec)
assert _spec.loader is not None
_spec.loader.exec_module(exact)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = self.first(x.flatten(1)).relu()
        return self.last((h + self.second(h)).relu() + h)


NETS = {
    "dense": ((1, 2, 2), lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))),
    "conv": ((1, 3, 3), lambda: nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Conv2d(2, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3))),
    "max pool": ((1, 3, 3), lambda: nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(2, 3))),
    "residual": ((1, 2, 2), Residual),
}  # fmt: skip


def net_of(kind, seed, rows=4):
    shape, maker = NETS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = maker().eval()
        with torch.no_grad():
            for part in net.modules():
                if isinstance(part, nn.Linear | nn.Conv2d):
                    part.weight.mul_(2.5)
        return net, trace(TorchModel(net), shape).graph(), torch.rand(rows, *shape)


def asked(rows, s, seed):
    return torch.randn(rows, s, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def minima(graph, where, ask, sides=0):
    programs = (exact.Program(graph, where.take(torch.tensor([i])), sides) for i in range(len(ask)))
    return np.array([p.minimum(a.numpy(), np.zeros(len(a))) for p, a in zip(programs, ask, strict=True)])


def question(ask, offset):
    return Question(ask, torch.as_tensor(offset)[:, None].expand(ask.shape[:2]).clone())


@pytest.mark.parametrize("s", [1, 2])
@pytest.mark.parametrize("kind", NETS)
def test_the_decision_is_the_truth_on_either_side_of_the_boundary(kind, s):
    _, graph, x = net_of(kind, 1, 14)
    where, ask = region(Linf(0.12), x), asked(14, s, 1)
    least = minima(graph, where, ask)
    above = decide(graph, where, question(ask, 1e-3 - least), width=256)
    below = decide(graph, where, question(ask, -1e-3 - least), width=256)
    assert above.state.tolist() == [PROVED] * 14
    assert below.state.tolist() == [BROKEN] * 14
    assert (above.lower <= 1e-3 + 1e-7).all()
    assert (above.lower > 0).all()
    assert (below.lower <= -1e-3 + 1e-7).all()
    said = torch.einsum("nk,nsk->ns", graph.forward(below.point), ask) + torch.tensor(-1e-3 - least)[:, None]
    assert (said <= 0).all()
    assert ((below.point >= where.low) & (below.point <= where.high)).all()


@pytest.mark.parametrize("seed", [1])
def test_just_below_and_just_above_the_radius(seed):
    _, graph, x = net_of("dense", seed)
    x = x[:2]
    y = graph.forward(x.double()).argmax(1)
    ask = margins(graph, y, x.double())
    for row in range(2):
        one, low, high = x[row : row + 1], 0.0, 0.5
        for _ in range(12):
            eps = (low + high) / 2
            program = exact.Program(graph, region(Linf(eps), one))
            safe = min(program.minimum(a[None].numpy(), np.zeros(1)) for a in ask[row]) > 0
            low, high = (eps, high) if safe else (low, eps)
        if high == 0.5:
            continue
        home = torch.zeros(2, dtype=torch.int64)
        for eps, state in ((low - 1e-4, PROVED), (high + 5e-4, BROKEN)):
            both = Question(ask[row].unsqueeze(1), torch.zeros(2, 1, dtype=torch.float64))
            assert decide(graph, region(Linf(eps), one), both, home=home).state.tolist() == [state]


@pytest.mark.parametrize("s", [1, 2])
@pytest.mark.parametrize("seed", range(2))
def test_the_euclidean_ball(seed, s):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    with torch.no_grad():
        for layer in net[1::2]:
            layer.weight.mul_(2.5)
    graph = trace(TorchModel(net), (1, 1, 2)).graph()
    x = torch.rand(4, 1, 1, 2)
    where, ask = region(L2(0.3), x), asked(4, s, seed)
    least = minima(graph, where, ask, sides=400)  # the planes around the ball reach 3e-5 of its radius further
    assert decide(graph, where, question(ask, 1e-3 - least)).state.tolist() == [PROVED] * 4
    below = decide(graph, where, question(ask, -4e-3 - least))
    assert below.state.tolist() == [BROKEN] * 4
    assert ((below.point - where.x).flatten(1).norm(dim=1) <= 0.300001 + 1e-9).all()


@pytest.mark.parametrize("kind", NETS)
def test_no_multiplier_passes_the_exact_minimum_under_the_splits(kind):
    _, graph, x = net_of(kind, 1)
    where, ask = region(Linf(0.3), x), asked(4, 1, 1)
    bounds = crown(graph, where).bounds
    stem = Stem(graph, where, bounds, ask, torch.zeros(4, 1, dtype=torch.float64), torch.arange(4))
    leaves = stem.roots(torch.arange(4))
    programs = [exact.Program(graph, where.take(torch.tensor([i]))) for i in range(4)]
    entries = [(place, i) for place in stem.arguments for i in range(int(np.prod(graph.nodes[place].shape)))]
    generator, gained = torch.Generator().manual_seed(0), 0
    for _ in range(2):
        choice = choose(stem, leaves, graph, torch.float64, 2)
        leaves = leaves.take((choice.at >= 0).nonzero().squeeze(1))
        choice = choice.take((choice.at >= 0).nonzero().squeeze(1))
        leaves = children(leaves, choice.at, choice.scale)
        keep = torch.randperm(len(leaves.at), generator=generator)[:6]
        leaves = leaves.take(keep)
        frame = Frame(stem, leaves)
        least = []
        for at, sign, q in zip(leaves.at.tolist(), leaves.sign.tolist(), leaves.question.tolist(), strict=True):
            splits = [(*entries[a], b) for a, b in zip(at, sign, strict=True) if a >= 0]
            least.append(programs[q].minimum(ask[q].numpy(), np.zeros(1), splits))
        plain = frame.bound({})[0].squeeze(1).numpy()
        for scale in (0.0, 0.3, 1.0, 3.0):
            shapes = {key: values.shape for key, values in frame.variables().items()}
            given = {key: torch.rand(shape, generator=generator).double() for key, shape in shapes.items()}
            given[BETA] = given[BETA] * scale
            value = frame.bound(given)[0].squeeze(1).numpy()
            assert (value <= np.array(least) + 1e-7).all()
            gained += int((value > plain + 1e-6).sum())
    assert gained


def test_every_decision_is_that_of_the_row_alone_and_order_does_not_matter():
    _, graph, x = net_of("conv", 2)
    x = torch.cat([x, 1 - x])
    where, ask = region(Linf(0.12), x), asked(8, 1, 3)
    least = minima(graph, where, ask)
    q = question(ask, np.where(np.arange(8) % 2, 2e-3, -2e-3) - least)
    whole = decide(graph, where, q)
    assert whole.state.tolist() == [BROKEN, PROVED] * 4
    for width in (2, 11):
        assert torch.equal(decide(graph, where, q, width=width).state, whole.state)
    back = torch.arange(8).flip(0)
    assert torch.equal(decide(graph, where.take(back), q.take(back)).state.flip(0), whole.state)
    for i in (1, 4):
        one = torch.tensor([i])
        assert decide(graph, where.take(one), q.take(one)).state == whole.state[i]


def test_the_deadline_and_the_count_of_subproblems():
    _, graph, x = net_of("dense", 0)
    where, ask = region(Linf(0.3), x), asked(4, 1, 0)
    q = question(ask, 1e-3 - minima(graph, where, ask))
    past = decide(graph, where, q, deadline=time.monotonic() - 1)
    assert past.state.tolist() == [OPEN] * 4
    assert past.nodes.tolist() == [0] * 4
    assert past.lower.isneginf().all()
    easy = decide(graph, where, Question(q.asked, q.offset + 100))
    assert easy.state.tolist() == [PROVED] * 4
    assert easy.nodes.tolist() == [1] * 4  # CROWN's own bound
    told = []
    hard = decide(graph, where, q, tell=told.append)
    assert (hard.nodes > 2).any()
    assert ((hard.nodes % 2 == 0) | (hard.nodes == 1)).all()  # two bounds without a split, then halves in pairs
    assert [int(d.nodes.sum()) for d in told] == sorted(int(d.nodes.sum()) for d in told)
    assert torch.equal(told[-1].state, hard.state)


def test_a_deadline_in_the_middle_is_kept_and_what_is_proved_by_then_stays(monkeypatch):
    _, graph, x = net_of("conv", 1)
    where, ask = region(Linf(0.25), x), asked(4, 2, 1)
    q = question(ask, 1e-4 - minima(graph, where, ask))
    began = time.monotonic()
    cut = decide(graph, where, q, deadline=began + 0.15)
    assert time.monotonic() - began < 1.0
    assert ((cut.state == PROVED) == (cut.lower > 0)).all()
    assert (cut.lower <= 1e-4 + 1e-7).all()


def test_what_the_model_may_round_away_is_no_proof():
    _, graph, x = net_of("conv", 0)
    where, ask = region(Linf(0.01), x), asked(4, 1, 0)
    error = logit_error(graph, crown(graph, where).bounds, unit(x.device))
    guard = (ask.abs().squeeze(1) * error).sum(1).numpy()
    least = minima(graph, where, ask)
    assert (guard > 1e-7).all()
    assert decide(graph, where, question(ask, 0.5 * guard - least)).state.tolist() == [OPEN] * 4
    assert decide(graph, where, question(ask, 1.1 * guard - least)).state.tolist() == [PROVED] * 4


def test_questions_of_one_row_stand_and_fall_together():
    _, graph, x = net_of("dense", 3)
    where, ask = region(Linf(0.2), x), asked(4, 1, 5)
    least = minima(graph, where, ask)
    first = question(ask, np.array([1e-3, 1e-3, 1e-3, -1e-3]) - least)
    second = question(ask, np.array([1e-3, -1e-3, 1.0, 1.0]) - least)
    home = torch.arange(4).repeat(2)
    both = Question(torch.cat([first.asked, second.asked]), torch.cat([first.offset, second.offset]))
    assert decide(graph, where, both, home=home).state.tolist() == [PROVED, BROKEN, PROVED, BROKEN]
    blind = decide(
        graph, where, both, home=home, confirm=lambda points, _: torch.zeros(len(points), dtype=torch.bool)
    )
    assert blind.state.tolist() == [PROVED, OPEN, PROVED, OPEN]


def test_who_confirms_has_the_last_word():
    _, graph, x = net_of("dense", 0)
    where, ask = region(Linf(0.2), x), asked(4, 1, 0)
    q, heard = question(ask, -0.1 - minima(graph, where, ask)), []

    def never(points, rows):
        heard.extend(rows.tolist())
        return torch.zeros(len(points), dtype=torch.bool)

    found = decide(graph, where, q, confirm=never)
    assert found.state.tolist() == [OPEN] * 4
    assert set(heard) == {0, 1, 2, 3}


def test_memory_that_runs_out_narrows_and_a_crowd_is_given_up(monkeypatch):
    _, graph, x = net_of("conv", 2)
    where, ask = region(Linf(0.15), x), asked(4, 1, 3)
    q, seen = question(ask, 1e-3 - minima(graph, where, ask)), []
    real = search.choose

    def short(stem, leaves, *rest):
        seen.append(len(leaves.question))
        if len(leaves.question) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return real(stem, leaves, *rest)

    monkeypatch.setattr(search, "choose", short)
    assert decide(graph, where, q, width=32).state.tolist() == [PROVED] * 4
    assert max(seen[3:]) <= 4
    monkeypatch.setattr(search, "choose", real)
    some = np.array([100.0, -1e-3, -1e-3, -1e-3])  # the first row is proved before memory runs out
    real_descend, bad = search.descend, question(ask, some - minima(graph, where, ask))

    def narrow(quick, here, asked_, offset, start, *rest):  # fails in the middle of the bookkeeping
        if len(start) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return real_descend(quick, here, asked_, offset, start, *rest)

    monkeypatch.setattr(search, "descend", narrow)
    assert decide(graph, where, q, width=32).state.tolist() == [PROVED] * 4
    assert decide(graph, where, bad, width=64).state.tolist() == [PROVED] + [BROKEN] * 3
    few = decide(graph, where, q, width=4, effort=Effort(most=0, in_all=0))
    assert OPEN in few.state.tolist()
    assert (few.lower[few.state == OPEN] <= 0).all()


def test_the_frontier_takes_the_case_that_is_nearest_its_end():
    _, graph, x = net_of("dense", 0)
    where = region(Linf(0.1), x)
    one = torch.zeros(4, 1, dtype=torch.float64)
    stem = Stem(graph, where, crown(graph, where).bounds, asked(4, 1, 0), one, torch.arange(4))
    leaves = stem.roots(torch.arange(4))
    frontier = Frontier(10, 10)
    frontier.push([0, 0, 1, 1], replace(leaves, lower=torch.tensor([-1.0, -3.0, -2.0, -0.5]).double()))
    assert frontier.lowest(0) == -3.0
    taken = frontier.pop(3)
    assert [case for case, _ in taken] == [1, 1, 0]
    assert [float(leaf.lower) for _, leaf in taken] == [-2.0, -0.5, -3.0]
    assert len(frontier) == 1


@pytest.mark.parametrize("threat", [Linf(0.03), L2(0.15)], ids=lambda t: t.norm)
def test_images_are_certified_or_broken_by_the_model_itself(make, images, threat):
    model, (x, _) = TorchModel(make("conv")), images(10)
    y = model.query(x, 0).labels.clone()
    y[0] = (y[0] + 1) % 3
    found = certify(model, x, y, threat, deadline=time.monotonic() + 20)
    assert (found.certified ^ found.broken).all()
    assert found.broken[0]
    assert threat.contains(found.worst, x).all()
    assert torch.equal(model.query(found.worst, 0).labels != y, found.broken)
    assert torch.equal(found.lower > 0, found.certified)


def test_activations_that_cannot_be_split_stay_open(make, images):
    model, (x, _) = TorchModel(make("tanh")), images(24)
    y = model.query(x, 0).labels
    found = certify(model, x, y, Linf(0.02), deadline=time.monotonic() + 20)
    assert not (found.certified & found.broken).any()
    assert (~found.certified & ~found.broken).any()


def test_what_cannot_be_meant_is_refused():
    _, graph, x = net_of("dense", 0)
    with pytest.raises(UsageError, match="expected asked"):
        decide(graph, region(Linf(0.1), x), Question(asked(3, 1, 0), torch.zeros(3, 1)))
