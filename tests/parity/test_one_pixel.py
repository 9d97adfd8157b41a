"""One pixel: query for query beside a plain differential evolution, what it draws, and what it must find."""

from __future__ import annotations

import pytest
import torch

from sparring.attacks.one_pixel import OnePixel
from sparring.core import noise
from sparring.core.errors import UsageError
from sparring.core.losses import cross_entropy
from sparring.core.threat import threat
from sparring.engine.loop import run
from sparring.testing import Probe, Puzzle, puzzle


def picture(x0, genes):
    """The image with the pixels of one member in it, one after the other."""
    x = x0.clone()
    _, h, w = x0.shape
    for row, column, *values in genes:
        x[:, min(int(row * h), h - 1), min(int(column * w), w - 1)] = torch.tensor(values)
    return x


def reference(x0, key, pixels, members, scale):
    """The evolution, one row: yields where to ask, is sent the log-probability there."""
    channels = x0.shape[0]
    population, fitness = [], []
    for k in range(members):
        places = noise.uniform(key, (pixels, 2), 2 * k)[0]
        values = (0.5 + 0.5 * noise.normal(key, (pixels, channels), 2 * k + 1)[0]).clamp(0, 1)
        population.append(torch.cat([places, values], 1))
        fitness.append((yield picture(x0, population[-1].tolist())))
    k = members
    while True:
        parent = k % members
        others = [(parent + 1 + i) % members for i in range(members - 1)]
        u = noise.uniform(key, (3,), 2 * k)[0].double().tolist()
        first = others[int(u[0] * len(others))]
        rest = [i for i in others if i != first]
        second = rest[int(u[1] * len(rest))]
        rest.remove(second)
        third = rest[int(u[2] * len(rest))]
        child = population[first] + scale * (population[second] - population[third])
        fresh = noise.uniform(key, child.shape, 2 * k + 1)[0]
        for index in ((child < 0) | (child > 1)).nonzero().tolist():
            child[tuple(index)] = fresh[tuple(index)]
        answer = yield picture(x0, child.tolist())
        if answer >= fitness[parent]:
            population[parent], fitness[parent] = child, answer
        k += 1


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("eps", [1.0, 3.0])
def test_every_point_is_that_of_the_reference(eps, targeted, scored):
    case = puzzle("l0", targeted=targeted)
    case = Puzzle(case.model, threat("l0", eps), case.x, case.y, case.targets)
    for row in range(4):
        beside = reference(case.x[row], torch.tensor([77 + row]), int(eps), 7, 0.5)
        point, last = next(beside), None
        for state, value in scored(OnePixel(members=7), case, row, 200, cross_entropy):
            torch.testing.assert_close(state.x[0], point, atol=1e-6, rtol=0)
            point, last = beside.send(value), state
        assert (last.fitness > -torch.inf).all()


def test_as_many_pixels_change_as_the_features_allow(scored):
    x = noise.uniform(torch.arange(4), (3, 6, 5))
    y = torch.zeros(4, dtype=torch.int64)
    model = Probe(lambda flat: torch.stack([0 * flat[:, 0] + 2, 0 * flat[:, 0]], 1))
    for eps, pixels, features in ((1.0, 1, 1), (2.0, 1, 2), (3.0, 1, 3), (7.0, 2, 6), (1000.0, 30, 90)):
        case = Puzzle(model, threat("l0", eps), x, y, None)
        most, fewest = 0, 90
        for state, _ in scored(OnePixel(members=6), case, 0, 30, cross_entropy):
            changed = state.x[0] != x[0]
            most, fewest = max(most, int(changed.sum())), min(fewest, int(changed.any(0).sum()))
            assert case.limit.contains(state.x, x[:1]).all()
        assert state.genes.shape[2] == pixels
        assert fewest <= pixels
        assert most <= features
        assert most == features or eps > 100


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_it_finds_the_only_pixel_that_matters(rows):
    """One pixel of 100, above 0.9, and a score that grows the nearer the value comes to that."""

    def logits(flat):
        high = flat[:, 37] - 0.9
        return torch.stack([-high, high], 1)

    x, y = 0.5 * noise.uniform(torch.arange(rows), (1, 10, 10)), torch.zeros(rows, dtype=torch.int64)
    got = run(Probe(logits), OnePixel(steps=3000), threat("l0", 1.0), x, y)
    assert got.found.all()
    assert got.distance.tolist() == [1] * rows
    assert (got.best.flatten(1)[:, 37] > 0.9).all()


def test_queries_are_as_many_as_stated():
    x, y = torch.full((3, 1, 4, 4), 0.5), torch.zeros(3, dtype=torch.int64)
    model = Probe(lambda flat: torch.stack([0 * flat[:, 0] + 2, 0 * flat[:, 0]], 1))
    got = run(model, OnePixel(steps=150), threat("l0", 2.0), x, y)
    assert not got.found.any()
    assert got.forward.tolist() == [151] * 3


def test_a_population_without_three_others():
    case = puzzle("l0")
    with pytest.raises(UsageError, match="at least 4 members"):
        run(case.model, OnePixel(members=3), case.limit, case.x, case.y)
