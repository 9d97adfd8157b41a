"""Random noise: how often it crosses a plane, beside the closed form in every norm; legal, counted, always new."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import special, stats

from sparring.attacks.random_noise import RandomNoise
from sparring.core import noise
from sparring.core.attack import Observation
from sparring.core.batch import Batch
from sparring.core.model import Access, Prediction
from sparring.core.threat import Unbounded, threat
from sparring.engine.loop import run
from sparring.testing import Probe

WIDE = (-100.0, 100.0)


def beyond(offset, feature=None, bounds=WIDE):
    """Class 1 where the first feature (or the sum of all) is more than `offset`."""

    def logits(flat):
        along = flat[:, 0] if feature == 0 else flat.sum(1)
        return torch.stack([offset - along, along - offset], 1)

    return Probe(logits, bounds=bounds)


def crossing(norm, d):
    """(eps, model, chance that one draw crosses its plane), each chance from a textbook law."""
    eps, t = 2.0, 0.7
    if norm == "linf":  # the sum of d uniform numbers: Irwin and Hall
        share = sum(
            (-1) ** k * math.comb(d, k) * (t * d / 2 + d / 2 - k) ** d for k in range(int(t * d / 2 + d / 2) + 1)
        ) / math.factorial(d)
        return eps, beyond(t * d / 2 * 2 * eps), 1 - share
    if norm == "l2":  # a cap of the ball
        return eps, beyond(t * eps * math.sqrt(d)), special.betainc((d + 1) / 2, 0.5, 1 - t**2) / 2
    if norm == "l1":  # one coordinate of the simplex: a beta law, with either sign
        return eps, beyond(0.3 * eps, 0), 0.5 * 0.7 ** (d - 1)
    if norm == "l0":  # two features of d, anywhere in the bounds
        return eps, beyond(20.0, 0), eps / d * 0.4
    return eps, beyond(20.0, 0), 0.4


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0", "unbounded"])
@pytest.mark.parametrize("steps", [1, 6])
def test_the_chance_to_cross_a_plane_is_that_of_the_closed_form(norm, steps):
    d, rows = 4, 3000
    eps, model, chance = crossing(norm, d)
    limit = Unbounded(WIDE) if norm == "unbounded" else threat(norm, eps, WIDE)
    x, y = torch.zeros(rows, 1, 2, 2), torch.zeros(rows, dtype=torch.int64)
    outcome = run(model, RandomNoise(steps=steps), limit, x, y)
    wanted = 1 - (1 - chance) ** steps
    low, high = stats.binom.interval(0.999, rows, wanted)
    assert low <= int(outcome.found.sum()) <= high, (wanted, int(outcome.found.sum()) / rows)
    assert limit.contains(outcome.best, x).all()
    held = ~outcome.found
    assert outcome.forward[held].unique().tolist() == [steps]
    if steps > 1:  # those that fell left at the first draw that crossed: a geometric law
        mean = outcome.forward.double().mean()
        assert float(mean) == pytest.approx((1 - (1 - chance) ** steps) / chance, rel=0.05)


@pytest.mark.parametrize("norm", RandomNoise.norms)
def test_every_draw_is_legal_and_new(norm):
    limit = Unbounded() if norm == "unbounded" else threat(norm, {"linf": 0.1, "l0": 3.0}.get(norm, 0.5))
    x, zero = noise.uniform(torch.arange(5), (2, 3, 3)), torch.zeros(5, dtype=torch.int64)
    batch = Batch(x, zero, zero - 1, torch.arange(5), limit)
    attack, seen = RandomNoise(steps=50), Observation(batch, Prediction(zero), zero > 0, Access.DECISION)
    state = attack.init(batch)
    points = [state.x]
    while not state.done.any():
        state = attack.step(batch, state, seen)
        points.append(state.x)
    assert len(points) == 50
    assert state.done.all()
    assert all(limit.contains(point, x).all() for point in points)
    assert len(torch.stack(points).flatten(0, 1).flatten(1).unique(dim=0)) == 250


def test_the_draws_of_the_ball_fill_it():
    """Uniform in an L2 ball: the length to the power d is uniform; in Linf every feature is."""
    x, zero = torch.zeros(4000, 1, 1, 3), torch.zeros(4000, dtype=torch.int64)
    for norm in ("l2", "linf"):
        batch = Batch(x, zero, zero - 1, noise.keys(0, torch.arange(4000), zero), threat(norm, 2.0, WIDE))
        state = RandomNoise().init(batch)
        seen = Observation(batch, Prediction(zero), zero > 0, Access.DECISION)
        delta = RandomNoise().step(batch, state, seen).x.flatten(1).double()
        values = (delta.norm(dim=1) / 2) ** 3 if norm == "l2" else delta[:, 1] / 4 + 0.5
        assert stats.kstest(values.numpy(), "uniform").pvalue > 0.01
