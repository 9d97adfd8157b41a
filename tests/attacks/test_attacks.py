"""What each attack promises about its own options."""

from __future__ import annotations

import pytest
import torch

from sparring.attacks.apgd import APGD
from sparring.attacks.fgsm import FGSM
from sparring.attacks.fooling import Fooling
from sparring.attacks.pgd import PGD
from sparring.core.errors import UsageError
from sparring.core.losses import LOSSES
from sparring.core.threat import L2, Linf
from sparring.engine.loop import run
from sparring.models.torch import TorchModel
from sparring.testing import puzzle


@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("kind", [PGD, APGD])
def test_every_loss_finds_something(kind, loss):
    case = puzzle("linf")
    assert int(case.play(kind(steps=20, loss=loss)).found.sum()) >= 8
    aimed = puzzle("linf", targeted=True)
    assert int(aimed.play(kind(steps=20, loss=loss)).found.sum()) >= 6


def test_an_unknown_loss_is_an_error():
    with pytest.raises(UsageError, match="unknown loss 'crossentropy'; did you mean 'cross_entropy'"):
        puzzle("linf").play(PGD(loss="crossentropy"))


def test_fgsm_in_l2_is_one_step_of_eps_and_then_the_bounds(net, digits):
    """A longer step would come back onto the sphere elsewhere, as many pixels stand on a bound."""
    x = digits[0][:8]
    y = net(x).argmax(1)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(torch.nn.functional.cross_entropy(net(leaf).double(), y, reduction="sum"), leaf)
    wanted = (x + 0.6 * slope / slope.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).clamp(0, 1)
    got = run(TorchModel(net), FGSM(), L2(0.6), x, y)
    torch.testing.assert_close(got.best, wanted, rtol=0, atol=1e-5)


def test_the_step_size_left_out_is_two_and_a_half_eps_over_steps():
    case = puzzle("linf")
    implied, given = case.play(PGD(steps=10)), case.play(PGD(steps=10, step_size=0.25 * case.limit.eps))
    assert torch.equal(implied.best, given.best)


def test_a_random_start_is_the_only_noise_of_pgd():
    case = puzzle("linf")
    one, two = (case.play(PGD(steps=5, random_start=False)) for _ in range(2))
    assert torch.equal(one.best, two.best)
    assert not torch.equal(one.best, case.play(PGD(steps=5)).best)


def test_zero_gradients_leave_the_point_where_it_is(net, digits):
    """A model whose logits no longer answer to pixels: no NaN, no move."""
    flat = torch.nn.Sequential(net, torch.nn.Hardtanh(-1e-30, 1e-30)).eval()
    x = digits[0][:4]
    y = flat(x).argmax(1)
    got = run(TorchModel(flat), PGD(steps=3, random_start=False), Linf(0.1), x, y)
    assert not got.found.any()
    assert torch.equal(got.best, x)


@pytest.mark.parametrize("loss", ["quadratic", "tempered"])
def test_a_picture_to_stay_near_brings_the_noise_nearer(loss):
    case = puzzle("unbounded", targeted=True)
    free = case.play(Fooling(steps=200, loss=loss))
    near = case.play(Fooling(steps=200, lam=0.05, step_size=0.05, loss=loss))
    both = free.found & near.found
    assert int(both.sum()) >= 8
    assert float(near.distance[both].mean()) < 0.7 * float(free.distance[both].mean())
    assert Fooling(lam=0.05).minimizes
    assert not Fooling().minimizes
