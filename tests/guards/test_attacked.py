"""Guards around a trained net: who knows them breaks them, whoever runs into their gradient does not."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

import sparring
from sparring.attacks.pgd import PGD
from sparring.attacks.square import Square
from sparring.auditing import masking
from sparring.core.errors import AttackError
from sparring.core.threat import Linf
from sparring.guards.binarise import Binarise
from sparring.guards.bit_depth import BitDepth
from sparring.guards.energy import Energy
from sparring.guards.feature_squeezing import FeatureSqueezing
from sparring.guards.jpeg import JPEG
from sparring.guards.random_resize_pad import RandomResizePad
from sparring.guards.smoothing import Smoothing

STEPS = PGD(steps=20)


@pytest.fixture(scope="module")
def rows(digits):
    x, y = digits
    return x[1500:1600], y[1500:1600]


def robust(model, rows, attack=STEPS, eps=0.3):
    return sparring.attack(model, *rows, attack, Linf(eps)).robust_accuracy


@pytest.mark.parametrize("guard", [BitDepth(2), JPEG(75)])
def test_straight_through_no_row_more_holds_than_on_the_bare_net(guard, net, rows):
    assert robust(guard.adaptive(net), rows) <= robust(guard.naive(net), rows) + 0.02 < 0.05
    try:
        ran_into = robust(guard.judged(net), rows)
    except AttackError:
        return
    assert ran_into > 0.6


def test_binarised_pixels_that_eps_does_not_carry_over_the_threshold_stay(net, rows):
    """So that some rows hold in truth: a search without gradients finds no fewer of them robust."""
    guard = Binarise()
    knowing, without = robust(guard.adaptive(net), rows), robust(guard.judged(net), rows, Square(1000))
    assert robust(guard.naive(net), rows) == 0
    assert 0 < knowing <= without + 0.03 < 0.3
    out = sparring.attack(guard.adaptive(net), *rows, PGD(steps=20), Linf(0.3))
    frozen = (rows[0] > 0.81) | (rows[0] < 0.19)
    assert torch.equal(guard.transform(out.best)[frozen], guard.transform(rows[0])[frozen])


@pytest.mark.parametrize("guard", [BitDepth(1), BitDepth(2), Binarise()])
def test_what_an_attack_found_holds_as_deployed(guard, net, rows):
    x, y = rows
    out = sparring.attack(guard.adaptive(net), x, y, STEPS, Linf(0.2))
    assert torch.equal(net(guard.transform(out.best)).argmax(1) != y, out.found)
    assert not out.moved.any()


@pytest.mark.parametrize("guard", [RandomResizePad(0.7), Smoothing(0.25)])
def test_random_guards_fall_to_the_mean_of_their_draws(guard, net, rows):
    assert robust(guard.naive(net), rows) == 0
    assert robust(guard.adaptive(net), rows) <= 0.02


@pytest.mark.parametrize("kind", [Energy, FeatureSqueezing])
def test_a_detector_is_passed_by_who_knows_it(kind, net, digits, rows):
    guard = kind().fitted(net, digits[0][1600:])
    unaware = sparring.transfer(guard.naive(net), guard.judged(net), *rows, [PGD(steps=20)], Linf(0.1))
    out = sparring.attack(guard.adaptive(net), *rows, STEPS, Linf(0.1))
    assert out.robust_accuracy <= unaware.robust_accuracy
    said = guard.judged(net).query(out.best, sparring.Access.DECISION)
    broken = out.found & ~out.clean
    assert broken.sum() > 10
    assert not said.flagged[broken].any()
    assert (said.labels[broken] != rows[1][broken]).all()
    held = ~out.found
    assert (said.flagged | (said.labels == rows[1]))[held].all()


class Hidden(BitDepth):
    """Claims a gradient that it does not have."""

    differentiable: ClassVar[bool] = True


class Silent(Smoothing):
    """Claims to draw nothing."""

    randomised: ClassVar[bool] = False


@pytest.mark.parametrize(
    ("guard", "sign", "raised"),
    [
        (Hidden(2), "zero_gradient", True),
        (BitDepth(2), "zero_gradient", False),
        (Silent(0.3), "random_outputs", True),
        (Smoothing(0.3), "random_outputs", False),
    ],
)
def test_an_audit_sees_through_a_wrong_claim(guard, sign, raised, net, rows):
    x, y = rows[0][:30], rows[1][:30]
    signs, _ = masking.check(guard.adaptive(net, 5), x, y, Linf(0.1), ids=torch.arange(30), width=32)
    assert {found.name: found.raised for found in signs}[sign] is raised
