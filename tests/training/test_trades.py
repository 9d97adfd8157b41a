"""TRADES: its loss beside a plain sum, and the points that it finds."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from sparring.core import noise
from sparring.core.defense import Moment
from sparring.core.threat import Linf, Threat, threat
from sparring.defenses.trades import TRADES, divergence

Rows = tuple[Tensor, Tensor]
EPS = {"linf": 0.1, "l2": 0.5, "l1": 1.5}


@pytest.fixture
def fresh(net: nn.Sequential) -> nn.Sequential:
    """A copy of the net, to be differentiated at will."""
    return deepcopy(net)


@pytest.fixture
def batch(digits: Rows) -> Rows:
    return digits[0][:16], digits[1][:16]


def moment(progress: float = 1.0, rows: int = 16) -> Moment:
    return Moment(progress, noise.keys(0, torch.arange(rows), torch.zeros(rows, dtype=torch.int64)))


def gradients(net: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(net.parameters())))


def plainly(net: nn.Module, x: Tensor, y: Tensor, worst: Tensor, beta: float) -> Tensor:
    """Equation 5, row by row and class by class."""
    total = torch.zeros(())
    for row in range(len(x)):
        p, q = (net(image[row : row + 1])[0].exp() for image in (x, worst))
        p, q = p / p.sum(), q / q.sum()
        total = total - p[y[row]].log() + beta * sum(a * (a / b).log() for a, b in zip(p, q, strict=True))
    return total / len(x)


@pytest.mark.parametrize("beta", [0.5, 1.0, 6.0])
def test_the_loss_and_its_gradient_are_those_of_the_plain_sum(beta, fresh, batch, monkeypatch):
    """At adversarial points that stand fixed: no gradient goes through how they were found."""
    x, y = batch
    worst = (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    monkeypatch.setattr(TRADES, "worst", lambda *_: worst)
    loss, wanted = TRADES(Linf(0.1), beta).loss(fresh, x, y, moment()), plainly(fresh, x, y, worst, beta)
    assert wanted > 1.02 * nn.functional.cross_entropy(fresh(x), y)
    torch.testing.assert_close(loss, wanted)
    for ours, theirs in zip(gradients(fresh, loss), gradients(fresh, wanted), strict=True):
        assert ours.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_points_that_it_finds_stand_fixed(fresh, batch):
    x, y = batch
    defense = TRADES(Linf(0.1), beta=6.0)
    worst = defense.worst(fresh, Linf(0.1), x, moment().key)
    assert not worst.requires_grad
    loss, wanted = defense.loss(fresh, x, y, moment()), plainly(fresh, x, y, worst, 6.0)
    torch.testing.assert_close(loss, wanted)
    for ours, theirs in zip(gradients(fresh, loss), gradients(fresh, wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_without_a_price_it_is_plain_cross_entropy(fresh, batch):
    x, y = batch
    loss = TRADES(Linf(0.1), beta=0.0).loss(fresh, x, y, moment())
    wanted = nn.functional.cross_entropy(fresh(x), y)
    assert torch.equal(loss, wanted)
    for ours, theirs in zip(gradients(fresh, loss), gradients(fresh, wanted), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_divergence_is_that_of_kullback_and_leibler():
    one, two = (3 * torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(2)).double()).unbind(0)
    p, q = (torch.distributions.Categorical(logits=logits) for logits in (one, two))
    torch.testing.assert_close(divergence(one, two), torch.distributions.kl_divergence(p, q))
    assert not divergence(one, one + 3).abs().gt(1e-12).any()
    assert divergence(torch.tensor([[100.0, -100.0]]), torch.tensor([[-100.0, 100.0]])).tolist() == [200.0]


# The points


@pytest.mark.parametrize("norm", sorted(EPS))
def test_the_points_are_legal_and_worse_than_where_they_began(norm, fresh, batch):
    x, _ = batch
    limit = threat(norm, EPS[norm])
    worst = TRADES(limit).worst(fresh, limit, x, moment().key)
    change = (worst.double() - x.double()).abs().flatten(1)
    far = {"linf": change.amax(1), "l1": change.sum(1)}.get(norm, change.square().sum(1).sqrt())
    assert far.max() <= EPS[norm] + limit.slack
    assert far.min() > 0.5 * EPS[norm]
    assert 0 <= worst.min() <= worst.max() <= 1
    with torch.no_grad():
        clean, began = fresh(x), limit.sample(x, moment().key)
        assert (divergence(clean, fresh(worst)) > divergence(clean, fresh(began))).float().mean() > 0.9


def test_a_row_is_worked_on_by_itself(fresh, batch):
    x, _ = batch
    whole = TRADES(Linf(0.1)).worst(fresh, Linf(0.1), x, moment().key)
    alone = TRADES(Linf(0.1)).worst(fresh, Linf(0.1), x[3:5], moment().key[3:5])
    torch.testing.assert_close(alone, whole[3:5])
    other = TRADES(Linf(0.1), steps=1).worst(fresh, Linf(0.1), x, moment().key + 1)
    assert not torch.equal(other, TRADES(Linf(0.1), steps=1).worst(fresh, Linf(0.1), x, moment().key))


def test_the_search_leaves_gradients_and_weights_alone(fresh, batch):
    x, y = batch
    marks = [torch.full_like(weight, 7.0) for weight in fresh.parameters()]
    for weight, mark in zip(fresh.parameters(), marks, strict=True):
        weight.grad = mark.clone()
    before = deepcopy(fresh.state_dict())
    TRADES(Linf(0.1)).worst(fresh, Linf(0.1), x, moment().key)
    loss = TRADES(Linf(0.1)).loss(fresh, x, y, moment())
    assert all(torch.equal(weight.grad, mark) for weight, mark in zip(fresh.parameters(), marks, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())
    assert not x.requires_grad
    loss.backward()
    assert not any(torch.equal(weight.grad, mark) for weight, mark in zip(fresh.parameters(), marks, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_it_searches_in_eval_mode_and_puts_the_mode_back(training, batch, monkeypatch):
    x, y = batch
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))
    net.train(training)
    modes, search = [], TRADES.worst

    def worst(self: TRADES, net: nn.Module, limit: Threat, x: Tensor, key: Tensor) -> Tensor:
        modes.append(net.training)
        counted = int(net[2].num_batches_tracked)
        found = search(self, net, limit, x, key)
        assert int(net[2].num_batches_tracked) == counted
        return found

    monkeypatch.setattr(TRADES, "worst", worst)
    TRADES(Linf(0.1)).loss(net, x, y, moment())
    assert modes == [False]
    assert net.training == training
    assert int(net[2].num_batches_tracked) == 2 * training


@pytest.mark.parametrize(
    ("progress", "warmup", "eps"),
    [(0.0, 0.3, 0.0), (0.15, 0.3, 0.05), (0.3, 0.3, 0.1), (1.0, 0.3, 0.1), (0.0, 0.0, 0.1)],
)
def test_eps_grows_over_the_warm_up(progress, warmup, eps, fresh, batch, monkeypatch):
    x, y = batch
    given, search = [], TRADES.worst

    def worst(self: TRADES, net: nn.Module, limit: Threat, x: Tensor, key: Tensor) -> Tensor:
        given.append(limit)
        return search(self, net, limit, x, key)

    monkeypatch.setattr(TRADES, "worst", worst)
    loss = TRADES(Linf(0.1), beta=6.0, warmup=warmup).loss(fresh, x, y, moment(progress))
    assert [limit.eps for limit in given] == [pytest.approx(eps)]
    plain = nn.functional.cross_entropy(fresh(x), y)
    assert torch.isclose(loss, plain) == (eps == 0)
