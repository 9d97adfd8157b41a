"""What guards claim about the gradient is measured, and what is attacked follows from it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from sparring import catalog
from sparring.core.errors import ModelError, UsageError
from sparring.core.model import Access, Sampled, fresh, passes
from sparring.engine.preflight import check_model
from sparring.guards.bit_depth import BitDepth
from sparring.guards.check import check_guard
from sparring.guards.energy import Energy
from sparring.guards.ensemble import Ensemble
from sparring.guards.feature_squeezing import FeatureSqueezing
from sparring.guards.guard import Guard, Transform
from sparring.guards.median import Median
from sparring.guards.smoothing import Smoothing
from sparring.models.bpda import bpda
from sparring.models.spec import digest_of

SPECIAL = {"ensemble", "energy", "feature_squeezing"}


def made(name, linear, images):
    """The guard called `name`, ready for use."""
    if name == "ensemble":
        return Ensemble((lambda x: linear(x).tanh(),))
    guard = catalog.guard(name)
    return guard.fitted(linear, images, 0.5) if guard.detects else guard


@pytest.mark.parametrize("name", sorted(catalog.guards()))
def test_every_guard_of_the_catalogue_claims_what_is_true(name, linear, images):
    guard = made(name, linear, images)
    assert guard.name == name
    state = torch.get_rng_state()
    check_guard(guard, linear, images)
    assert torch.equal(torch.get_rng_state(), state)
    for model in (guard.naive(linear), guard.judged(linear, 10), guard.adaptive(linear, 10)):
        assert check_model(model, images) in (4, None)
    assert guard.adaptive(linear, 10).access == Access.GRADIENT


@pytest.mark.parametrize("name", sorted(catalog.guards()))
@pytest.mark.parametrize("what", ["differentiable", "randomised", "detects"])
def test_the_opposite_of_each_claim_is_refused(name, what, linear, images):
    guard = made(name, linear, images)
    liar = type("Liar", (type(guard),), {what: not getattr(guard, what)})
    values = {field.name: getattr(guard, field.name) for field in fields(guard)}
    with pytest.raises(ModelError, match=f"{name} claims {what} = {not getattr(guard, what)}, measured"):
        check_guard(liar(**values), linear, images)


@dataclass(frozen=True)
class Mine(Transform):
    """A user's guard: whatever `function` does."""

    function: object
    differentiable: bool
    randomised: bool = False
    name: ClassVar[str] = "mine"

    def transform(self, x):
        return self.function(x)


def dithered(x):
    return (x * 4 + torch.as_tensor(np.random.rand(*x.shape[1:])).to(x)).floor() / 4  # noqa: NPY002 - a global draw


@pytest.mark.parametrize(
    ("function", "truth"),
    [
        (lambda x: x * 0.9, (True, False)),
        (lambda x: (x * 8).round() / 8, (False, False)),
        (lambda x: x + ((x * 8).round() / 8 - x).detach(), (False, False)),  # the gradient was put there by hand
        (bpda(torch.round), (False, False)),
        (lambda x: x.detach(), (False, False)),
        (lambda x: x + x.sqrt() * 0 / 0, (False, False)),
        (lambda x: x + 0.1 * torch.rand_like(x), (True, True)),
        (dithered, (False, True)),
    ],
    ids=["linear", "round", "straight through", "bpda", "detached", "nan", "noise", "dithered"],
)
def test_a_users_guard_is_measured(function, truth, linear, images):
    before = np.random.get_state()[2]  # noqa: NPY002 - where the global generator stands
    for differentiable in (False, True):
        for randomised in (False, True):
            guard = Mine(function, differentiable, randomised)
            if (differentiable, randomised) == truth:
                check_guard(guard, linear, images)
            else:
                with pytest.raises(ModelError, match="mine claims"):
                    check_guard(guard, linear, images)
    assert np.random.get_state()[2] == before  # noqa: NPY002


@dataclass(frozen=True)
class Noisy(Transform):
    """Adds what `draw` gives, and says that it is Gaussian noise of sigma 0.2."""

    draw: object
    votes: bool = True
    randomised: bool = True
    differentiable: ClassVar[bool] = True
    name: ClassVar[str] = "noisy"
    gaussian_noise: ClassVar[float] = 0.2

    def transform(self, x):
        return x + self.draw(x)


def test_gaussian_noise_of_ones_own_is_as_good(linear, images):
    check_guard(Noisy(lambda x: 0.2 * torch.randn_like(x)), linear, images)
    said = {name: made(name, linear, images).gaussian_noise for name in catalog.guards()}
    assert said == dict.fromkeys(catalog.guards()) | {"smoothing": 0.25}


@pytest.mark.parametrize(
    "liar",
    [
        Noisy(lambda x: 0.18 * torch.randn_like(x)),
        Noisy(lambda x: 0.2 * 12**0.5 * (torch.rand_like(x) - 0.5)),
        Noisy(lambda x: 0.2 * torch.randn_like(x) + 0.01),
        Noisy(lambda x: 0.2 * torch.randn_like(x[:, :, :1, :1])),
        Noisy(lambda x: (x + 0.2 * torch.randn_like(x)).clamp(0, 1) - x),
        Noisy(lambda x: 0.2 * torch.randn_like(x), votes=False),
    ],
    ids=["weaker", "uniform", "shifted", "one for all pixels", "clipped", "no vote"],
)
def test_what_is_no_such_noise_is_refused(liar, linear, images):
    with pytest.raises(ModelError, match=r"noisy claims gaussian_noise = 0\.2, but is not just a vote on images"):
        check_guard(liar, linear, images)


class Bare(Transform):
    """No dataclass, and says itself what it is."""

    def __init__(self):
        self.table = torch.zeros(1000)

    def __repr__(self):
        return "Bare of mine"

    def transform(self, x):
        return x


@dataclass(frozen=True)
class Held(Transform):
    """Holds a net of its own."""

    net: nn.Module
    rate: float

    def transform(self, x):
        return x


def test_straight_through_the_gradient_is_the_nets_at_the_changed_image(linear, images):
    net = nn.Sequential(linear, nn.Tanh())
    guard, v = BitDepth(2), torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    said = guard.adaptive(net).query(images, Access.GRADIENT)
    changed = guard.naive(net).query((images * 3).round() / 3, Access.GRADIENT)
    assert torch.equal(said.logits, changed.logits)
    assert torch.equal(said.vjp(v), changed.vjp(v))
    assert guard.judged(net).query(images, Access.GRADIENT).vjp(v).abs().max() == 0


@dataclass(frozen=True)
class Ramp(Transform):
    """Rounding, with a stand-in of slope 3."""

    differentiable: ClassVar[bool] = False
    randomised: ClassVar[bool] = False

    def transform(self, x):
        return x.round()

    def stand_in(self, x):
        return 3 * x


def test_a_stand_in_is_differentiated_in_its_place(linear, images):
    v = torch.ones(6, 4)
    said = Ramp().adaptive(linear).query(images, Access.GRADIENT)
    torch.testing.assert_close(said.logits, linear(images.round()))
    torch.testing.assert_close(said.vjp(v), 3 * linear[1].weight.sum(0).view(1, 3, 9, 11).expand(6, -1, -1, -1))


def test_what_has_a_gradient_keeps_it(linear, images):
    v = torch.randn(6, 4, generator=torch.Generator().manual_seed(4))
    leaf = images.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(linear(Median(3).transform(leaf)), leaf, v)
    for model in (Median(3).adaptive(linear), Median(3).judged(linear)):
        assert torch.equal(model.query(images, Access.GRADIENT).vjp(v), wanted)


class Counting(nn.Module):
    """A linear net that remembers what it was shown."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.seen = linear, []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return self.linear(x)


def test_a_random_guard_is_attacked_through_the_mean_of_its_draws(linear, images):
    net = Counting(linear)
    said = Smoothing(0.2).adaptive(net, 7).query(images, Access.GRADIENT)
    assert len({float(shown[0, 0, 0, 0]) for shown in net.seen}) == 7
    p = torch.stack([linear(shown).double().softmax(1) for shown in net.seen])
    torch.testing.assert_close(said.logits.double(), p.mean(0).log(), rtol=1e-5, atol=1e-5)
    # d log mean p_k / d x = sum_i p_ik (W_k - sum_j p_ij W_j) / sum_i p_ik
    weight = linear[1].weight.double()
    each = p[..., None] * (weight[None, None] - (p @ weight)[:, :, None])
    wanted = (each.sum(0) / p.sum(0)[..., None]).sum(1).view_as(images)
    torch.testing.assert_close(said.vjp(torch.ones(6, 4)).double(), wanted, rtol=1e-4, atol=1e-5)


def test_smoothing_is_judged_by_the_majority_of_other_draws(images, linear):
    net = Counting(linear)
    guard = Smoothing(1.0)
    said = guard.judged(net, 9).query(images, Access.SCORE)
    named = torch.stack([linear(shown).argmax(1) for shown in net.seen])
    counts = torch.stack([(named == c).sum(0) for c in range(4)], 1)
    assert torch.equal(counts.gather(1, said.labels[:, None]).squeeze(1), counts.amax(1))
    assert torch.equal(said.votes, counts.amax(1) / 9)
    assert said.logits is None
    assert passes(guard.judged(net, 9)) == passes(guard.adaptive(net, 9)) == 9
    shown, net.seen = net.seen, []
    guard.adaptive(net, 9).query(images, Access.SCORE)
    assert not {float(x[0, 0, 0, 0]) for x in shown} & {float(x[0, 0, 0, 0]) for x in net.seen}


def test_what_is_found_is_confirmed_as_deployed(images, linear):
    smooth = Smoothing(1.0)
    wanted = smooth.judged(linear, 5).query(images, Access.SCORE)
    confirming = fresh(smooth.adaptive(linear, 5)).query(images, Access.SCORE)
    assert torch.equal(confirming.labels, wanted.labels)
    assert confirming.logits is wanted.logits is None
    for guard in (BitDepth(1), Median(3), FeatureSqueezing().fitted(linear, images, 0.5)):
        one, two = (model.query(images, Access.SCORE) for model in (guard.adaptive(linear), guard.judged(linear)))
        assert torch.equal(one.logits, two.logits)
        assert not isinstance(guard.adaptive(linear), Sampled) or guard.detects


def test_a_digest_tells_guards_apart(linear):
    other = nn.Sequential(nn.Flatten(), nn.Linear(297, 4))
    again = nn.Sequential(nn.Flatten(), nn.Linear(297, 4))
    guards = (BitDepth(1), BitDepth(2), Median(2), Ensemble((other,)), Ensemble((again,)))
    digests = [digest_of(guard.judged(linear)) for guard in guards]
    assert len(set(digests)) == 5
    assert digests == [digest_of(guard.judged(linear)) for guard in guards]
    assert None not in digests


def test_nets_are_counted_where_a_guard_is_shown(linear):
    assert str(Ensemble((linear, linear))) == "Ensemble(others=2 nets)"
    assert repr(linear) in repr(Ensemble((linear,)))
    assert str(Held(linear, 0.5)) == "Held(net=1 net, rate=0.5)"
    assert str(Bare()) == repr(Bare()) == "Bare of mine"
    assert str(FeatureSqueezing(threshold=0.123456)) == (
        "FeatureSqueezing(threshold=0.1235, squeezers=(BitDepth(bits=1), Median(size=2)))"
    )
    for guard in (
        BitDepth(2),
        FeatureSqueezing(threshold=0.5),
        Ensemble((linear.forward,)),
        *map(catalog.guard, ("jpeg", "median", "energy")),
    ):
        assert str(guard) == repr(guard)


def test_a_detector_says_which_rows_it_flags(images, linear):
    guard = Energy().fitted(linear, images, 0.5)
    for model in (guard.judged(linear), guard.adaptive(linear), fresh(guard.judged(linear))):
        for access in Access:
            said = model.query(images, access)
            assert torch.equal(said.flagged, said.labels == 4)
            assert int(said.flagged.sum()) == 3
            assert (said.logits is None) == (access == Access.DECISION)
    assert BitDepth().judged(linear).query(images, Access.SCORE).flagged is None


@pytest.mark.parametrize("net", [None, 3, nn.Linear])
def test_what_is_no_net(net):
    for build in (BitDepth().naive, BitDepth().judged, BitDepth().adaptive):
        with pytest.raises(UsageError, match="expected a torch module from raw pixels"):
            build(net)


def test_random_squeezers_are_refused():
    with pytest.raises(UsageError, match="expected squeezers that are not random"):
        FeatureSqueezing(squeezers=(Smoothing(),))
    with pytest.raises(UsageError, match="one or more"):
        FeatureSqueezing(squeezers=())


def test_the_catalogue_holds_the_guards():
    assert SPECIAL | {"bit_depth", "jpeg", "median", "smoothing"} <= set(catalog.guards())
    assert catalog.guard("bit_depth:bits=2") == BitDepth(2)
    assert all(issubclass(kind, Guard) for kind in catalog.guards().values())
    with pytest.raises(UsageError, match="did you mean 'jpeg'"):
        catalog.guard("jepg")
