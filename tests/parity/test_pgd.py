"""PGD, FGSM, DDN and Fooling against plain loops over rows, written from the papers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from sparring.attacks.ddn import DDN
from sparring.attacks.fgsm import FGSM
from sparring.attacks.fooling import Fooling
from sparring.attacks.pgd import PGD
from sparring.core import noise
from sparring.core.threat import L1, L2, Linf, Unbounded
from sparring.engine.loop import run
from sparring.models.torch import TorchModel

pytestmark = pytest.mark.usefixtures("scaled_then_clipped")
Rows = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def rows(digits: Rows, net: nn.Sequential) -> Rows:
    x, y = digits[0][1500:], digits[1][1500:]
    right = (net(x).argmax(1) == y).nonzero().squeeze(1)[:24]
    return x[right], y[right]


def gradient(net: nn.Module, x: Tensor, y: int, sign: float = 1.0) -> Tensor:
    """Of the cross-entropy at one image (1, c, h, w)."""
    leaf = x.clone().requires_grad_()
    loss = sign * nn.functional.cross_entropy(net(leaf).double(), torch.tensor([y]))
    return torch.autograd.grad(loss, leaf)[0]


def key(row: int) -> Tensor:
    return noise.keys(0, torch.tensor([row]), torch.tensor([0]))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fgsm(norm, net, rows):
    x, y = rows
    eps = 0.1 if norm == "linf" else 0.6
    got = run(TorchModel(net), FGSM(), (Linf if norm == "linf" else L2)(eps), x, y)
    for row in range(len(x)):
        g = gradient(net, x[row : row + 1], int(y[row]))
        step = g.sign() if norm == "linf" else g / g.norm()
        wanted = (x[row : row + 1] + eps * step).clamp(0, 1)
        torch.testing.assert_close(got.best[row : row + 1], wanted, rtol=0, atol=1e-5)
        assert bool(got.found[row]) == (int(net(wanted).argmax()) != int(y[row]))
    assert got.found.any()
    assert not got.found.all()


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd(norm, random_start, net, rows):
    """Madry et al. 2018, section 2.1, with the same start; stops at its first success as ours does."""
    x, y = rows
    eps, size, steps = (0.08, 0.02, 12) if norm == "linf" else (0.5, 0.12, 12)
    limit = (Linf if norm == "linf" else L2)(eps)
    got = run(TorchModel(net), PGD(steps=steps, step_size=size, random_start=random_start), limit, x, y)
    for row in range(len(x)):
        clean, label = x[row : row + 1], int(y[row])
        point = limit.sample(clean, key(row)) if random_start else clean
        for step in range(steps + 1):
            if int(net(point).argmax()) != label or step == steps:
                break
            g = gradient(net, point, label)
            if norm == "linf":
                delta = (point + size * g.sign() - clean).clamp(-eps, eps)
            else:
                delta = point + size * g / g.norm() - clean
                delta = delta * min(1.0, eps / float(delta.norm()))
            point = (clean + delta).clamp(0, 1)
        assert bool(got.found[row]) == (int(net(point).argmax()) != label)
        torch.testing.assert_close(got.best[row : row + 1], point, rtol=0, atol=2e-6)
    assert got.found.any()
    assert not got.found.all()


def test_pgd_in_l1(net, rows):
    """A step goes to the steepest of the pixels that can still move; on digits most stand on a bound."""
    x, y = rows
    size, steps, limit = 0.3, 12, L1(2.0)
    got = run(TorchModel(net), PGD(steps=steps, step_size=size, random_start=False), limit, x, y)
    barred = 0
    for row in range(len(x)):
        clean, label = x[row : row + 1], int(y[row])
        point = clean
        for step in range(steps + 1):
            if int(net(point).argmax()) != label or step == steps:
                break
            g = gradient(net, point, label).flatten()
            at, far = point.flatten(), g.abs().argsort(descending=True).tolist()
            stuck = [i for i in far if (g[i] > 0 and at[i] >= 1) or (g[i] < 0 and at[i] <= 0)]
            first = next(i for i in far if i not in stuck)
            barred += first != far[0]
            moved = at.clone()
            moved[first] += size * g[first].sign()
            point = limit.project(moved.view_as(point), clean)
        torch.testing.assert_close(got.best[row : row + 1], point, rtol=0, atol=2e-6)
    assert barred > 10
    assert got.found.any()


@pytest.mark.parametrize("targeted", [False, True])
def test_ddn(targeted, net, rows):
    """Rony et al. 2019, algorithm 1, one row at a time (without its 8-bit rounding)."""
    x, y = rows
    steps, gamma = 60, 0.05
    goal = (y + 1) % 10
    got = run(
        TorchModel(net), DDN(steps=steps, gamma=gamma), L2(10.0), x, y, targets=goal[:, None] if targeted else None
    )
    assert got.found.all()
    for row in range(12):
        clean = x[row : row + 1]
        label, sign = (int(goal[row]), -1.0) if targeted else (int(y[row]), 1.0)
        delta, radius, best = torch.zeros_like(clean), 1.0, math.inf
        for k in range(steps + 1):
            hit = (int(net(clean + delta).argmax()) == label) is targeted
            if hit:
                best = min(best, float(delta.double().norm()))
            radius *= 1 - gamma if hit else 1 + gamma
            g = gradient(net, clean + delta, label, sign)
            size = 0.01 + 0.99 * (1 + math.cos(math.pi * k / steps)) / 2
            moved = delta + size * g / g.norm()
            delta = (clean + radius * moved / moved.norm()).clamp(0, 1) - clean
        assert float(got.distance[row]) == pytest.approx(best, rel=1e-3)


def test_ddn_against_foolbox(net, rows):
    """The medians of two implementations agree within 3 %; theirs also rounds nothing here."""
    foolbox = pytest.importorskip("foolbox")
    x, y = rows
    theirs = foolbox.attacks.DDNAttack(steps=200, init_epsilon=1.0, gamma=0.05)
    _, found, hits = theirs(foolbox.PyTorchModel(net, bounds=(0, 1)), x, y, epsilons=None)
    assert hits.all()
    wanted = (found - x).flatten(1).norm(dim=1).median()
    ours = run(TorchModel(net), DDN(steps=200), Unbounded(), x, y)
    assert ours.found.all()
    assert float(ours.distance.median()) == pytest.approx(float(wanted), rel=0.03)


@pytest.mark.parametrize("lam", [0.0, 0.02])
def test_fooling(lam, net, rows):
    """C = 1/2 ||goal - softmax||^2 + lam ||x - x_target||^2, descended by steps of fixed length."""
    x, y = rows
    goal, steps, size = (y + 3) % 10, 40, 0.2
    attack = Fooling(steps=steps, lam=lam, step_size=size, loss="quadratic")
    got = run(TorchModel(net), attack, Unbounded(), x, y, targets=goal[:, None])
    for row in range(10):
        picture, wanted_label = x[row : row + 1], int(goal[row])
        onehot = torch.eye(10)[wanted_label].double()
        point = (0.5 + 0.3 * noise.normal(key(row), (1, 8, 8))).clamp(0, 1)
        near, best = math.inf, None
        for _ in range(steps + 1):
            if int(net(point).argmax()) == wanted_label:
                far = float((point.double() - picture.double()).norm())
                if best is None or (lam > 0 and far < near):
                    near, best = far, point
                if lam == 0:
                    break
            leaf = point.clone().requires_grad_()
            cost = 0.5 * (onehot - net(leaf).double().softmax(1)).square().sum()
            (g,) = torch.autograd.grad(cost + lam * (leaf - picture).double().square().sum(), leaf)
            point = (point - size * g / g.norm()).clamp(0, 1)
        assert bool(got.found[row]) is (best is not None)
        if best is not None:
            assert float(got.distance[row]) == pytest.approx(near, rel=2e-3)
            if lam == 0:
                torch.testing.assert_close(got.best[row : row + 1], best, rtol=0, atol=1e-3)
    assert got.found[:10].any()
