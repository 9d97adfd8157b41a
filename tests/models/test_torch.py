"""The adapter for PyTorch modules answers queries and leaves the module as it found it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparring.attacks.pgd import PGD
from sparring.core.model import Access
from sparring.core.threat import Linf
from sparring.engine.loop import run
from sparring.models import nets
from sparring.models.torch import TorchModel


def images(rows=4, channels=1):
    return torch.rand(rows, channels, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_run_leaves_the_module_as_it_was(training, frozen):
    net = nets.build("dense", (1, 8, 8), 10).train(training).requires_grad_(not frozen)
    marks = {name: torch.full_like(p, 3.0) for name, p in net.named_parameters()}
    for name, p in net.named_parameters():
        p.grad = marks[name].clone() if name.endswith("bias") else None
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x, y = images(), torch.arange(4)
    run(TorchModel(net), PGD(steps=3), Linf(0.1), x, y)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    for name, p in net.named_parameters():
        assert p.requires_grad is not frozen
        assert p.grad is None or torch.equal(p.grad, marks[name])
        assert (p.grad is None) is not name.endswith("bias")
    assert all(module.training is training for module in net.modules())
    assert not x.requires_grad


def test_access_shows_no_more_than_it_says(shows_no_more):
    shows_no_more(TorchModel(nets.build("dense", (1, 8, 8), 10)), images())


def test_the_pullback_is_the_vector_jacobian_product():
    net = nets.build("dense", (1, 8, 8), 10).double()
    x = images(2).double()
    answer = TorchModel(net).query(x, Access.GRADIENT)
    v = torch.randn(2, 10, generator=torch.Generator().manual_seed(1)).double()
    got = answer.vjp(v, keep=True)
    assert torch.equal(answer.vjp(v), got)
    step = 1e-6
    for row, pixel in ((0, 3), (1, 60)):
        up, down = x.clone(), x.clone()
        up[row].view(-1)[pixel] += step
        down[row].view(-1)[pixel] -= step
        wanted = ((net(up) - net(down)) * v).sum() / (2 * step)
        assert got[row].view(-1)[pixel].item() == pytest.approx(wanted.item(), rel=1e-4, abs=1e-9)


def test_mean_and_std_are_part_of_the_model():
    net = nets.build("conv", (3, 8, 8), 10)
    mean, std, x = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), images(4, 3)
    inside = TorchModel(net, mean=mean, std=std).query(x, Access.GRADIENT)
    outside = TorchModel(net).query(
        (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1), Access.GRADIENT
    )
    torch.testing.assert_close(inside.logits, outside.logits, rtol=0, atol=0)
    v = torch.ones(4, 10)
    wanted = outside.vjp(v) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(inside.vjp(v), wanted)


def test_probabilities_become_logits():
    net = nets.build("dense", (1, 8, 8), 10)
    soft = TorchModel(nn.Sequential(net, nn.Softmax(1)), probabilities=True).query(images(), Access.SCORE)
    torch.testing.assert_close(soft.logits, net(images()).log_softmax(1).detach(), rtol=1e-4, atol=1e-5)
    hard = TorchModel(lambda x: torch.eye(3)[:2][torch.zeros(len(x), dtype=torch.int64)], probabilities=True)
    assert hard.query(images(), Access.SCORE).logits.isfinite().all()


@pytest.mark.parametrize("name", sorted(nets.NETS))
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 8, 8), (1, 9, 7)])
def test_our_networks_fit_images_of_any_size_and_their_seed(name, shape):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    net, again, other = (nets.build(name, shape, 7, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert net(torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))).shape == (2, 7)
    for one, two, three in zip(net.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        assert not torch.equal(one, three)


@pytest.mark.parametrize("contrast", ["", "contrast_"])
def test_a_known_size(contrast):
    sizes = {f"{contrast}conv": 166_406, f"wide_{contrast}conv": 436_202}
    for name, size in sizes.items():
        assert sum(p.numel() for p in nets.build(name, (1, 28, 28), 10).parameters()) == size


def test_contrast_is_stretched_and_clipped_before_conv():
    x = torch.tensor([0.0, 0.2, 0.3, 0.4, 0.6, 0.7, 1.0]).view(1, 1, 1, 7)
    torch.testing.assert_close(nets.Contrast()(x).flatten(), torch.tensor([0.0, 0.0, 0.0, 0.25, 0.75, 1.0, 1.0]))
    leaky = nets.Contrast(0.2, 0.6, leak=0.1)(x.requires_grad_())
    torch.testing.assert_close(leaky.flatten(), torch.tensor([0.0, 0.02, 0.255, 0.49, 0.96, 0.97, 1.0]))
    (slope,) = torch.autograd.grad(leaky.sum(), x)
    torch.testing.assert_close(slope.flatten()[[0, 3, 6]], torch.tensor([0.1, 2.35, 0.1]))
    big = images()
    plain, net = (nets.build(name, big.shape[1:], 4, seed=3) for name in ("conv", "contrast_conv"))
    assert torch.equal(net(big), plain(net[0](big)))
