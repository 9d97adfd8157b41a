"""bpda: the layer forward, the stand-in backward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import sparring
from sparring.attacks.pgd import PGD
from sparring.core.errors import ModelError, UsageError
from sparring.core.model import Access
from sparring.core.threat import Linf
from sparring.engine.loop import run
from sparring.models.bpda import bpda
from sparring.models.torch import TorchModel


def made(seed=0):
    return torch.Generator().manual_seed(seed)


def levels(x):
    return (x * 8).round() / 8


def pixels(rows=3):
    return torch.rand(rows, 1, 4, 4, generator=made())


def differentiated(layer, x, v):
    leaf = x.clone().requires_grad_()
    out = layer(leaf)
    (gradient,) = torch.autograd.grad(out, leaf, v)
    return out.detach(), gradient


def test_by_hand_the_identity_passes_the_gradient_on():
    x, v = torch.tensor([[0.1, 0.3]]), torch.tensor([[5.0, -7.0]])
    out, gradient = differentiated(bpda(torch.round), x * 10, v)
    assert out.tolist() == [[1.0, 3.0]]
    assert gradient.tolist() == [[5.0, -7.0]]


def test_by_hand_a_stand_in_gives_its_own_gradient_where_the_layer_was_asked():
    x = torch.tensor([[2.0, -3.0]])
    out, gradient = differentiated(bpda(torch.sign, lambda z: z**3), x, torch.ones(1, 2))
    assert out.tolist() == [[1.0, -1.0]]
    assert gradient.tolist() == [[12.0, 27.0]]


def test_a_differentiable_layer_that_stands_in_for_itself_keeps_its_gradient():
    layer = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.AvgPool2d(2))
    x, v = pixels(), torch.randn(3, 2, 1, 1, generator=made(1))
    wanted, got = differentiated(layer, x, v), differentiated(bpda(layer, layer), x, v)
    assert torch.equal(wanted[0], got[0])
    assert torch.equal(wanted[1], got[1])


def by_numpy(x):
    return np.round(x.numpy() * 8) / np.float64(8)


def differentiating(x):
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad((leaf**2).sum(), leaf)
    return slope.round()


def demanding(x):
    assert torch.is_grad_enabled(), "raises under no_grad"
    return levels(x)


def writing(x):
    return x.mul_(8).round_().div_(8)


@pytest.mark.parametrize(
    ("layer", "wanted"),
    [
        (by_numpy, levels),
        (demanding, levels),
        (writing, levels),
        (lambda x: (x * 8).round().to(torch.uint8), lambda x: (x * 8).round()),
        (lambda x: x > 0.5, lambda x: (x > 0.5).float()),
        (lambda x: (x * 8).long().numpy(), lambda x: (x * 8).floor()),
        (differentiating, lambda x: (2 * x).round()),
    ],
    ids=["numpy", "needs grad", "writes", "uint8", "bool", "numpy int", "differentiates"],
)
@pytest.mark.parametrize("access", [Access.SCORE, Access.GRADIENT])
def test_layers_of_every_kind(layer, wanted, access):
    x, weight = pixels(), torch.randn(3, 16, generator=made(2))
    before = x.clone()
    net = nn.Sequential(bpda(layer), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 3, bias=False))
    net[3].weight.data = weight
    answer = TorchModel(net).query(x, access)
    value = wanted(x)
    torch.testing.assert_close(answer.logits, value.flatten(1) @ weight.T, rtol=1e-5, atol=1e-5)
    if access == Access.GRADIENT:
        gradient = answer.vjp(torch.eye(3))
        torch.testing.assert_close(gradient.flatten(1), weight * (value.flatten(1) > 0))
    assert torch.equal(x, before)
    assert not x.requires_grad


def test_numbers_of_torch_keep_their_precision():
    assert bpda(lambda x: x.double())(pixels()).dtype == torch.float64
    assert bpda(by_numpy)(pixels()).dtype == torch.float32
    _, gradient = differentiated(bpda(lambda x: x.double().round()), pixels(), torch.ones(3, 1, 4, 4).double())
    assert gradient.dtype == torch.float32


def test_a_stand_in_that_is_not_finite_leaves_the_answer_alone():
    out, _ = differentiated(bpda(levels, lambda x: x / 0.0), pixels(), torch.ones(3, 1, 4, 4))
    assert torch.equal(out, levels(pixels()))


def thermometer(x):
    return torch.cat([(x > k / 4).float() for k in range(4)], 1)


def ramps(x):
    return torch.cat([(4 * x - k).clamp(0, 1) for k in range(4)], 1)


def test_shapes_are_checked():
    x = pixels().requires_grad_()
    message = (
        r"expected a layer that keeps the shape \(3, 1, 4, 4\), got \(3, 4, 4, 4\); give .* bpda\(layer, backward"
    )
    with pytest.raises(ModelError, match=message):
        bpda(thermometer)(x)
    with torch.no_grad(), pytest.raises(ModelError, match=message):
        bpda(thermometer)(x)
    with pytest.raises(ModelError, match=r"expected backward to give \(3, 4, 4, 4\), as the layer does, got \(3, 1"):
        bpda(thermometer, lambda z: z)(x)
    with pytest.raises(ModelError, match="got str"):
        bpda(levels, lambda z: "no")(x)
    with pytest.raises(ModelError, match="expected a layer that gives a tensor or an array, got list"):
        bpda(lambda z: z.tolist())(x)
    v = torch.randn(3, 4, 4, 4, generator=made(3))
    out, gradient = differentiated(bpda(thermometer, ramps), pixels(), v)
    assert torch.equal(out, thermometer(pixels()))
    inside = torch.cat([(pixels() > k / 4) & (pixels() < (k + 1) / 4) for k in range(4)], 1)
    torch.testing.assert_close(gradient, (4 * inside * v).sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None,), "expected layer to be a module or a function of one tensor, got NoneType"),
        ((nn.ReLU,), "got the class ReLU"),
        ((levels, 1), "expected backward to be a module or a function of one tensor, got int"),
        ((levels, nn.Identity), "expected backward .* got the class Identity"),
    ],
)
def test_what_is_no_layer(arguments, message):
    with pytest.raises(UsageError, match=message):
        bpda(*arguments)


def test_it_is_a_module_like_others():
    layer = bpda(nn.Linear(4, 4), nn.Linear(4, 4))
    assert {name.split(".")[0] for name in layer.state_dict()} == {"layer", "stand_in"}
    assert not layer.eval().layer.training
    assert next(layer.double().parameters()).dtype == torch.float64


def test_a_quantised_linear_model_falls_at_its_closed_form_radius():
    """Logits (0, w q(x) - t) with q to eighths: from a level, half a step in each pixel leads to the next.

    At x = k/8 the level changes at x + sign(w)/16; w q(x) is then up by |w|_1 / 8, and the border is at half of that.
    """
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0] * 4)
    x = torch.full((2, 1, 4, 4), 0.5)
    border = float(weight.sum() * 0.5 + weight.abs().sum() / 16)
    y = torch.zeros(2, dtype=torch.int64)

    class Net(nn.Module):
        def __init__(self, quantise):
            super().__init__()
            self.quantise = quantise

        def forward(self, x):
            margin = self.quantise(x).flatten(1) @ weight - border
            return torch.stack([torch.zeros_like(margin), margin], 1)

    for eps, falls in ((0.06, False), (0.065, True)):
        defended = Net(levels)
        assert TorchModel(defended).query(x, Access.GRADIENT).vjp(torch.ones(2, 2)).abs().max() == 0
        out = run(TorchModel(defended), PGD(steps=10, random_start=False), Linf(eps), x, y)
        assert not out.found.any()
        defended.quantise = sparring.bpda(defended.quantise)
        out = run(TorchModel(defended), PGD(steps=10, random_start=False), Linf(eps), x, y)
        assert out.found.tolist() == [falls] * 2
        torch.testing.assert_close(out.best[0].flatten(), 0.5 + eps * weight.sign())
        assert TorchModel(Net(levels)).query(out.best, Access.SCORE).labels.tolist() == [int(falls)] * 2


def test_with_eot_a_layer_that_is_random_too_is_attacked():
    """A random offset before rounding down: on average the answer is that of the pixels themselves."""
    weight = torch.ones(16)
    x = torch.full((2, 1, 4, 4), 0.5)

    def dithered(z):
        return (z * 4 + torch.rand_like(z)).floor() / 4

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = bpda(dithered)

        def forward(self, x):
            margin = (self.layer(x).flatten(1) @ weight - 8.0 - 1.6) * 4  # E[layer(x)] = x: the border is 0.1 away
            return torch.stack([torch.zeros_like(margin), margin], 1)

    for eps, falls in ((0.03, False), (0.25, True)):
        out = run(sparring.EOT(Net(), 30), PGD(steps=8), Linf(eps), x, torch.zeros(2, dtype=torch.int64))
        assert out.found.tolist() == [falls] * 2
