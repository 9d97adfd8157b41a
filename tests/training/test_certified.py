"""The certified recipes: losses and gradients written out, bounds against every corner, and the schedule."""

from __future__ import annotations

import gc
from copy import deepcopy
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from sparring.attacks.pgd import PGD
from sparring.certificates.bounds import bounds
from sparring.core import noise
from sparring.core.defense import Moment
from sparring.core.errors import UsageError
from sparring.core.threat import L1, L2, Linf
from sparring.data import load
from sparring.defenses import ibp
from sparring.defenses.crown_ibp import CrownIBP, mixed_margins
from sparring.defenses.ibp import IBP, bounded, interval_margins, worst_case
from sparring.defenses.madry import Madry
from sparring.defenses.mtl_ibp import MTLIBP
from sparring.defenses.standard import Standard
from sparring.models.torch import TorchModel
from sparring.training.fit import Settings, fit

ROWS, CLASSES, EPS = 6, 3, 0.2
STEPS = PGD(steps=3)


def small(*widths: int, norm: bool = False, classes: int = CLASSES) -> nn.Sequential:
    """A ReLU net in float64 from images (1, 1, 4), with biases that leave every unit undecided for some image."""
    layers: list[nn.Module] = [nn.Flatten()]
    before = 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for width in widths:
            layers += [nn.Linear(before, width), *([nn.BatchNorm1d(width)] if norm else []), nn.ReLU()]
            before = width
        net = nn.Sequential(*layers, nn.Linear(before, classes))
    for weight in net.parameters():
        weight.data *= 2
    return net.double().train()


@pytest.fixture
def x() -> Tensor:
    drawn = torch.rand(ROWS, 1, 1, 4, generator=torch.Generator().manual_seed(1)).double()
    return (1.4 * drawn - 0.2).clamp(0, 1)  # some pixels lie where the bounds of the pixels cut the box


@pytest.fixture
def y() -> Tensor:
    return torch.arange(ROWS) % CLASSES


def moment(progress: float = 1.0, rows: int = ROWS) -> Moment:
    return Moment(progress, noise.keys(0, torch.arange(rows), torch.zeros(rows, dtype=torch.int64)))


def plain(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    logits = net(x)
    return (logits.exp().sum(1).log() - logits[torch.arange(len(y)), y]).mean()


def margins_by_hand(net: nn.Sequential, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Interval margins entry by entry: each product takes the end of its interval that is worse."""
    found = []
    linear = [layer for layer in net if isinstance(layer, nn.Linear)]
    for row, label in zip(x.flatten(1), y.tolist(), strict=True):
        low = [max(0.0, pixel - eps - 1e-6) for pixel in row.tolist()]  # the judge allows 1e-6 more
        high = [min(1.0, pixel + eps + 1e-6) for pixel in row.tolist()]
        for layer in linear[:-1]:
            ends = []
            for weights, bias in zip(layer.weight, layer.bias, strict=True):
                least = bias + sum(w * (a if w > 0 else b) for w, a, b in zip(weights, low, high, strict=True))
                most = bias + sum(w * (b if w > 0 else a) for w, a, b in zip(weights, low, high, strict=True))
                ends.append((least.clamp_min(0), most.clamp_min(0)))
            low, high = ([end[side] for end in ends] for side in (0, 1))
        last = linear[-1]
        for other in (k for k in range(last.out_features) if k != label):
            weights, bias = last.weight[label] - last.weight[other], last.bias[label] - last.bias[other]
            found.append(bias + sum(w * (a if w > 0 else b) for w, a, b in zip(weights, low, high, strict=True)))
    return torch.stack([margin.squeeze() for margin in found]).view(len(y), -1)


def by_hand(net: nn.Sequential, x: Tensor, y: Tensor, eps: float) -> Tensor:
    return (1 + (-margins_by_hand(net, x, y, eps)).exp().sum(1)).log().mean()


def same(net: nn.Module, loss: Tensor, wanted: Tensor) -> None:
    """Values and gradients agree, and there is something to agree on."""
    torch.testing.assert_close(loss, wanted)
    weights = list(net.parameters())
    found, meant = (torch.autograd.grad(value, weights, retain_graph=True) for value in (loss, wanted))
    for ours, theirs in zip(found, meant, strict=True):
        assert ours.any()
        torch.testing.assert_close(ours, theirs)


# IBP


@pytest.mark.parametrize("widths", [(), (5,), (5, 4)])
def test_the_loss_and_its_gradient_are_those_of_intervals_by_hand(widths, x, y):
    net = small(*widths)
    same(net, IBP(Linf(EPS)).loss(net, x, y, moment()), by_hand(net, x, y, EPS))


@pytest.mark.parametrize("widths", [(), (5,), (5, 4)])
def test_no_corner_is_below_the_margins_and_without_a_hidden_layer_one_lies_on_them(widths, x, y):
    net = small(*widths)
    graph, where = bounded(net, x, Linf(EPS), 1.0)
    lower = interval_margins(graph, y, where)
    least = torch.full_like(lower, torch.inf)
    for side in product((0.0, 1.0), repeat=4):
        corner = where.low + torch.tensor(side).view(1, 1, 1, 4) * (where.high - where.low)
        logits = net(corner)
        others = torch.stack([logits[i][torch.arange(CLASSES) != label] for i, label in enumerate(y)])
        least = torch.minimum(least, logits.gather(1, y[:, None]) - others)
    assert (least >= lower - 1e-12).all()
    if widths:
        assert (least > lower + 1e-3).any()  # intervals lose something
    else:
        torch.testing.assert_close(least, lower)  # the margins are folded into the only layer


def test_with_two_classes_the_loss_of_a_linear_net_is_that_of_the_worst_corner(x):
    net, y = small(classes=2), torch.arange(ROWS) % 2
    _, where = bounded(net, x, Linf(EPS), 1.0)
    worst = torch.zeros(ROWS).double()
    for side in product((0.0, 1.0), repeat=4):
        corner = where.low + torch.tensor(side).view(1, 1, 1, 4) * (where.high - where.low)
        worst = torch.maximum(worst, -net(corner).log_softmax(1)[torch.arange(ROWS), y])
    torch.testing.assert_close(IBP(Linf(EPS)).loss(net, x, y, moment()), worst.mean())


@pytest.mark.parametrize(
    ("progress", "warmup", "kappa", "eps", "clean"),
    [
        (0.0, 0.5, 0.0, 0.0, 1.0),
        (0.1, 0.5, 0.0, 0.04, 0.8),
        (0.25, 0.5, 0.5, 0.1, 0.75),
        (0.5, 0.5, 0.25, 0.2, 0.25),
        (0.9, 0.6, 0.25, 0.2, 0.25),
        (0.0, 0.0, 0.5, 0.2, 0.5),
        (0.7, 0.7, 1.0, 0.2, 1.0),
    ],
)
def test_eps_rises_and_the_share_of_clean_images_falls(progress, warmup, kappa, eps, clean, x, y):
    net = small(5)
    wanted = clean * plain(net, x, y) + (1 - clean) * by_hand(net, x, y, eps)
    same(net, IBP(Linf(EPS), kappa, warmup).loss(net, x, y, moment(progress)), wanted)


def test_a_ball_in_l2_is_bounded_by_its_box_and_pixels_may_have_other_bounds(x, y):
    net = small(5)
    same(net, IBP(L2(EPS)).loss(net, x, y, moment()), by_hand(net, x, y, EPS))
    centred = small(5)
    loss = IBP(Linf(2 * EPS, (-1.0, 1.0))).loss(centred, 2 * x - 1, y, moment())
    other = small(5)
    other[1].bias.data -= other[1].weight.data.sum(1)
    other[1].weight.data *= 2
    torch.testing.assert_close(loss, by_hand(other, x, y, EPS), rtol=1e-5, atol=1e-6)  # the slack is another


def test_without_clean_images_the_net_is_not_asked_at_all(x, y):
    net, asked = small(5), []
    IBP(Linf(EPS)).loss(net, x, y, moment())
    net.register_forward_hook(lambda *_: asked.append(1))
    IBP(Linf(EPS)).loss(net, x, y, moment())
    CrownIBP(Linf(EPS)).loss(net, x, y, moment())
    assert not asked
    IBP(Linf(EPS), 0.5).loss(net, x, y, moment())
    assert len(asked) == 1


# CROWN-IBP


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.3)], ids=["linf", "l2"])
def test_the_margins_are_those_that_the_certificate_has(threat, x, y):
    model, x = TorchModel(small(8, 6).float()), x.float()  # what is certified is in float32
    graph, where = bounded(small(8, 6).float().double(), x.double(), threat, 1.0)
    flat, lines = mixed_margins(graph, y, where, 0.0), mixed_margins(graph, y, where, 1.0)
    torch.testing.assert_close(flat, bounds(model, x, y, threat, "ibp").lower)
    torch.testing.assert_close(torch.maximum(flat, lines), bounds(model, x, y, threat, "crown-ibp").lower)
    assert (lines > flat + 1e-3).any()
    torch.testing.assert_close(mixed_margins(graph, y, where, 0.3), 0.3 * lines + 0.7 * flat)


def crown_by_hand(net: nn.Sequential, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Margins of a net of one hidden layer, with chords above and z or 0 below each undecided unit."""
    first, last = (layer for layer in net if isinstance(layer, nn.Linear))
    found = []
    for row, label in zip(x.flatten(1), y.tolist(), strict=True):
        low, high = (row - eps - 1e-6).clamp_min(0), (row + eps + 1e-6).clamp_max(1)
        least = first.bias + first.weight.clamp_min(0) @ low + first.weight.clamp_max(0) @ high
        most = first.bias + first.weight.clamp_min(0) @ high + first.weight.clamp_max(0) @ low
        for other in (k for k in range(CLASSES) if k != label):
            weights, value = last.weight[label] - last.weight[other], last.bias[label] - last.bias[other]
            way = torch.zeros(4).double()
            for unit in range(first.out_features):
                a, b, w = least[unit], most[unit], weights[unit]
                if a >= 0:
                    slope, shift = 1.0, 0.0
                elif b <= 0:
                    slope, shift = 0.0, 0.0
                elif w < 0:
                    slope, shift = b / (b - a), -a * b / (b - a)
                else:
                    slope, shift = float(b > -a), 0.0
                value = value + w * (slope * first.bias[unit] + shift)
                way = way + w * slope * first.weight[unit]
            found.append(value + (way.clamp_min(0) * low + way.clamp_max(0) * high).sum())
    return torch.stack(found).view(len(y), -1)


@pytest.mark.parametrize(
    ("progress", "linear", "clean"), [(0.0, 1.0, 1.0), (0.125, 0.8, 0.85), (0.25, 0.6, 0.7), (1.0, 0.2, 0.4)]
)
def test_the_margins_go_from_linear_bounds_to_intervals(progress, linear, clean, x, y):
    net, eps = small(7), EPS * min(1.0, 2 * progress)
    lower = linear * crown_by_hand(net, x, y, eps) + (1 - linear) * margins_by_hand(net, x, y, eps)
    wanted = clean * plain(net, x, y) + (1 - clean) * (1 + (-lower).exp().sum(1)).log().mean()
    same(net, CrownIBP(Linf(EPS), 0.4, 0.2, 0.5).loss(net, x, y, moment(progress)), wanted)


def test_crown_ibp_ends_as_ibp(x, y):
    net = small(5, 4)
    assert torch.equal(CrownIBP(Linf(EPS)).loss(net, x, y, moment()), IBP(Linf(EPS)).loss(net, x, y, moment()))


# MTL-IBP


@pytest.mark.parametrize("progress", [0.25, 1.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_two_losses_are_mixed(alpha, progress, x, y):
    net, eps = small(5), EPS * min(1.0, 2 * progress)
    points = Madry(STEPS, Linf(EPS), 0.5).points(net, x, y, moment(progress))
    assert (points - x).abs().max() == pytest.approx(eps)
    wanted = (1 - alpha) * plain(net, points, y) + alpha * by_hand(net, x, y, eps)
    same(net, MTLIBP(STEPS, Linf(EPS), alpha, 0.5).loss(net, x, y, moment(progress)), wanted)


def test_attack_and_intervals_enclose_the_mixed_loss(x, y):
    net = small(5, 4)
    least, mixed, most = (MTLIBP(STEPS, Linf(EPS), alpha).loss(net, x, y, moment()) for alpha in (0.0, 0.5, 1.0))
    assert least < mixed < most


# All of them

EVERY = [IBP(Linf(EPS), 0.5), CrownIBP(Linf(EPS), 0.5, 0.5), MTLIBP(STEPS, Linf(EPS))]


@pytest.mark.parametrize("recipe", EVERY, ids=lambda recipe: recipe.name)
def test_weights_modes_and_statistics_are_left_as_they_are(recipe, x, y):
    net = small(5, norm=True)
    before = deepcopy(net.state_dict())
    recipe.loss(net, x, y, moment()).backward()
    assert all(module.training for module in net.modules())
    assert all(weight.grad is not None for weight in net.parameters())
    assert int(net[2].num_batches_tracked) == 1  # by the pass of clean images or points
    assert all(torch.equal(weight, before[name]) for name, weight in net.named_parameters())


def test_bounds_are_those_of_batch_norm_in_eval_mode_as_it_stands_now(x, y):
    net, x = small(5, norm=True).float(), x.float()
    for _ in range(2):  # the second time from the trace that was kept
        net(2 * x)  # moves the statistics
        graph, where = bounded(net, x, Linf(EPS), 1.0)
        lower = bounds(TorchModel(deepcopy(net).eval()), x, y, Linf(EPS), "ibp").lower
        torch.testing.assert_close(interval_margins(graph, y, where).double(), lower, rtol=1e-4, atol=1e-5)


def test_new_weights_are_seen_and_a_net_that_is_gone_is_forgotten(x, y):
    gc.collect()
    net, before = small(5), len(ibp._TRACES)
    IBP(Linf(EPS)).loss(net, x, y, moment())
    net[1].weight = nn.Parameter(-net[1].weight.data)
    same(net, IBP(Linf(EPS)).loss(net, x, y, moment()), by_hand(net, x, y, EPS))
    assert len(ibp._TRACES) == before + 1
    del net
    gc.collect()
    assert len(ibp._TRACES) == before


def test_a_loss_stays_finite_where_bounds_are_wild():
    lower = torch.tensor([[-1e4, 3.0]], requires_grad=True)
    loss = worst_case(lower)
    assert loss.item() == pytest.approx(1e4)
    assert torch.autograd.grad(loss, lower)[0].tolist() == [[-1.0, 0.0]]


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: IBP(L1(1.0)), "expected linf or l2 for the bounds of ibp, got l1"),
        (lambda: CrownIBP(L1(1.0)), "bounds of crown_ibp"),
        (lambda: MTLIBP(STEPS, L1(1.0)), "bounds of mtl_ibp"),
        (lambda: IBP(Linf(0.1), -0.1), "expected kappa from 0 to 1"),
        (lambda: CrownIBP(Linf(0.1), 2.0), "expected kappa from 0 to 1"),
        (lambda: CrownIBP(Linf(0.1), beta=float("nan")), "expected beta from 0 to 1"),
        (lambda: MTLIBP(STEPS, Linf(0.1), 1.1), "expected alpha from 0 to 1"),
        (lambda: IBP(Linf(0.1), warmup=2.0), "expected warmup from 0 to 1"),
        (lambda: CrownIBP(Linf(0.1), warmup=-1.0), "expected warmup from 0 to 1"),
        (lambda: MTLIBP(STEPS, Linf(0.1), warmup=2.0), "expected warmup from 0 to 1"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(build, said):
    with pytest.raises(UsageError, match=said):
        build()


class Killed(Exception):
    pass


@pytest.mark.parametrize("recipe", EVERY, ids=lambda recipe: recipe.name)
def test_a_stopped_training_goes_on_to_the_same_weights(recipe, tmp_path):
    settings, digits = Settings("conv", 12, batch_size=16, every=4), load("digits")

    def stop(step: int) -> None:
        if step == 9:
            raise Killed

    with pytest.raises(Killed):
        fit(settings, digits, recipe, tmp_path / "a", on_step=stop)
    resumed, whole = (fit(settings, digits, recipe, tmp_path / name) for name in ("a", "b"))
    assert resumed.card["weights_sha256"] == whole.card["weights_sha256"]


def test_what_it_trains_can_be_proved_by_intervals(tmp_path):
    digits, proved = load("digits"), {}
    for recipe in (Standard(), IBP(Linf(0.1))):
        done = fit(Settings("dense", 400, every=400), digits, recipe, tmp_path / recipe.name)
        rows = digits.test.take(100)
        found = bounds(TorchModel(done.net), rows.x, rows.y, Linf(0.05), "ibp")
        proved[recipe.name] = int(found.certified.sum())
    assert proved["standard"] == 0
    assert proved["ibp"] >= 80
