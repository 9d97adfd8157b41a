"""SimBA: query for query beside a plain loop, its bases, and linear models."""

from __future__ import annotations

import math

import pytest
import torch

from sparring.attacks.simba import SimBA, cosines
from sparring.core import noise
from sparring.core.errors import UsageError
from sparring.core.losses import cross_entropy
from sparring.core.threat import threat
from sparring.engine.loop import run
from sparring.testing import Puzzle, linear, puzzle


def directions(shape, basis, share):
    """All vectors of the basis, one by one."""
    c, h, w = shape
    if basis == "pixel":
        yield from torch.eye(c * h * w, dtype=torch.float64).view(-1, c, h, w)
        return
    for channel in range(c):
        for i in range(math.ceil(share * h)):
            for j in range(math.ceil(share * w)):
                q = torch.zeros(shape, dtype=torch.float64)
                for row in range(h):
                    for column in range(w):
                        down = math.cos(math.pi * i * (2 * row + 1) / (2 * h))
                        q[channel, row, column] = down * math.cos(math.pi * j * (2 * column + 1) / (2 * w))
                yield q / q.norm()


def reference(x0, key, limit, size, basis, share):
    """Algorithm 1, one row: yields where to ask, is sent the log-probability there."""
    vectors, best, count = list(directions(x0.shape, basis, share)), x0, 1
    value = yield x0
    stream = 0
    while True:
        order = noise.uniform(key, (len(vectors),), stream)[0].argsort().tolist()
        for index in order:
            for sign in (1, -1):
                x = (best.double() + sign * size * vectors[index]).float()
                x = limit.project(x[None], x0[None])[0]
                answer = yield x
                count += 1
                if answer > value:
                    best, value = x, answer
                    break
        stream = count


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(("basis", "share"), [("pixel", 1.0), ("dct", 1.0), ("dct", 0.5)])
def test_every_point_is_that_of_the_reference(basis, share, targeted, scored):
    case, moves = puzzle("l2", targeted=targeted), 0
    for row in range(4):
        beside = reference(case.x[row], torch.tensor([77 + row]), case.limit, 0.1, basis, share)
        point, before = next(beside), None
        for state, value in scored(SimBA(size=0.1, basis=basis, share=share), case, row, 100, cross_entropy):
            torch.testing.assert_close(state.x[0], point, atol=2e-6, rtol=0)
            point = beside.send(value)
            moves += before is not None and not torch.equal(before, state.best)
            before = state.best
    assert moves > 40


def test_cosines_are_orthonormal_from_the_lowest_up():
    for size in (1, 5, 8):
        basis = cosines(size, torch.device("cpu"))
        torch.testing.assert_close(basis @ basis.T, torch.eye(size, dtype=torch.float64))
        turns = (basis[:, 1:] * basis[:, :-1] < 0).sum(1)
        assert turns.tolist() == list(range(size))


@pytest.mark.parametrize("basis", ["pixel", "dct"])
def test_the_change_after_t_moves_is_sqrt_t_steps_long(basis, scored):
    """Section 3 of the paper: no direction is used twice before all are used up."""
    case, moves, before = puzzle("l2"), -1, None
    case = Puzzle(case.model, threat("l2", 5.0), 0.4 + 0.2 * case.x, case.y, None)
    for state, _ in scored(SimBA(size=0.01, basis=basis), case, 1, 21, cross_entropy):
        length = float((state.best.double() - case.x[1]).norm())
        moves += before is None or not torch.equal(before, state.best)
        before = state.best
        assert length == pytest.approx(0.01 * math.sqrt(moves), abs=1e-6)
    assert moves >= 10


@pytest.mark.parametrize(("rows", "targeted"), [(1, True), (3, False), (8, True)])
@pytest.mark.parametrize("shape", [(1, 2, 3), (3, 4, 4), (1, 7, 7)])
@pytest.mark.parametrize("basis", ["pixel", "dct"])
def test_it_succeeds_beyond_the_distance_and_never_before(basis, shape, rows, targeted):
    """Steps of 0.02 on a hyperplane 0.5 away: coordinate steps with the ball's projection come within a tenth."""
    case = linear("l2", shape, rows)
    targets = torch.ones(rows, 1, dtype=torch.int64) if targeted else None
    for factor, wanted, steps in ((0.999, False, 400), (1.1, True, 3000)):
        limit = threat("l2", 0.5 * factor, case.model.bounds)
        got = run(case.model, SimBA(steps=steps, size=0.02, basis=basis), limit, case.x, case.y, targets=targets)
        assert got.found.tolist() == [wanted] * rows
        assert float(got.distance.max()) <= limit.eps + limit.slack
        if not wanted:
            assert got.forward.tolist() == [401] * rows


def test_a_basis_that_is_not_known():
    case = puzzle("l2")
    with pytest.raises(UsageError, match="did you mean"):
        run(case.model, SimBA(basis="pixels"), case.limit, case.x, case.y)
