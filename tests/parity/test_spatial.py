"""Spatial: its transforms beside SciPy's and exact ones, its list beside a plain one, its draws by their law."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from sparring.attacks.spatial import Spatial, transform
from sparring.core import noise
from sparring.core.attack import Observation
from sparring.core.batch import Batch
from sparring.core.errors import UsageError
from sparring.core.model import Access, Prediction
from sparring.core.threat import Unbounded
from sparring.engine.loop import run
from sparring.testing import Probe

SHAPES = [(1, 8, 8), (1, 5, 8), (3, 7, 7), (1, 28, 28), (2, 9, 4), (1, 1, 1)]


def images(shape, rows=3):
    return noise.uniform(torch.arange(rows) + 40, shape)


def moved(x, degrees=0.0, down=0.0, right=0.0, outside=0.0):
    amounts = (torch.full((len(x),), float(value)) for value in (degrees, down, right))
    return transform(x, *amounts, outside)


def scipys(x, degrees, down, right, outside):
    """One image (c, h, w): SciPy pulls each pixel from matrix @ here + offset."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    back = np.array([[cos, sin], [-sin, cos]])
    middle = (np.array(x.shape[1:]) - 1) / 2
    offset = middle - back @ (middle + np.array([down, right]))
    parts = [
        ndimage.affine_transform(part, back, offset, order=1, mode="grid-constant", cval=outside)
        for part in x.double().numpy()
    ]
    return torch.tensor(np.stack(parts))


def asked(attack, x, key, limit=None):
    """All points that one row asks about while nothing fools."""
    zero, limit = torch.zeros(1, dtype=torch.int64), limit or Unbounded()
    batch = Batch(x, zero, zero - 1, key, limit)
    state, never = attack.init(batch), torch.zeros(1, dtype=torch.bool)
    points = [state.x[0]]
    while not state.done:
        state = attack.step(batch, state, Observation(batch, Prediction(zero), never, Access.DECISION))
        points.append(state.x[0])
    return torch.stack(points)


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_turned_or_moved_is_the_image_bit_for_bit(shape):
    x = images(shape)
    assert torch.equal(moved(x), x)
    assert torch.equal(moved(x, outside=-3.0), x)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("down", "right"), [(1, 0), (0, 1), (-2, 1), (3, -3), (0, -1), (9, 0)])
def test_whole_pixels_are_exact(shape, down, right):
    x, wanted = images(shape), torch.full((3, *shape), 0.25)
    height, width = shape[1:]
    for i, j in itertools.product(range(height), range(width)):
        if 0 <= i + down < height and 0 <= j + right < width:
            wanted[:, :, i + down, j + right] = x[:, :, i, j]
    got = moved(x, down=down, right=right, outside=0.25)
    assert torch.equal(got, wanted)
    if abs(down) < height and abs(right) < width:  # what stays in the frame is what roll moves
        rows = slice(max(down, 0), height + min(down, 0)), slice(max(right, 0), width + min(right, 0))
        assert torch.equal(got[:, :, *rows], torch.roll(x, (down, right), (2, 3))[:, :, *rows])


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 7), (1, 28, 28)])
@pytest.mark.parametrize("quarters", [1, 2, 3, -1])
def test_right_angles_are_those_of_rot90(shape, quarters):
    x = images(shape)
    assert torch.equal(moved(x, degrees=90 * quarters), torch.rot90(x, quarters, (2, 3)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("outside", [0.0, -1.0])
def test_every_transform_is_that_of_scipy(shape, outside):
    for number, x in enumerate(images(shape, 8)):
        degrees, down, right = (60 * noise.uniform(torch.tensor([number]), (3,))[0] - 30).tolist()
        got = moved(x[None], degrees, down / 10, right / 10, outside)[0]
        wanted = scipys(x, *torch.tensor([degrees, down / 10, right / 10]).double().tolist(), outside)
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-6)


def test_the_grid_is_the_papers_775_transforms_from_the_mildest_on():
    x = images((1, 28, 28), 1)
    got = asked(Spatial(), x, torch.tensor([3]))
    turns, moves = np.linspace(-30, 30, 31), np.linspace(-3, 3, 5)
    grid = sorted(
        itertools.product(turns, moves, moves), key=lambda t: abs(t[0]) / 30 + abs(t[1]) / 3 + abs(t[2]) / 3
    )
    assert len(got) == len(grid) == 31 * 5 * 5
    assert torch.equal(got[0], x[0])
    share = [round(abs(t[0]) / 30 + abs(t[1]) / 3 + abs(t[2]) / 3, 6) for t in grid]
    for _, block in itertools.groupby(range(len(grid)), key=share.__getitem__):
        block = list(block)  # of equally mild ones the order is free
        wanted = torch.stack([scipys(x[0], *grid[i], 0.0) for i in block]).flatten(1)
        apart = (got[block].double().flatten(1)[:, None] - wanted).abs().amax(2)
        assert (apart.amin(0) < 1e-6).all()
        assert (apart.amin(1) < 1e-6).all()
    assert len(got.flatten(1).unique(dim=0)) == len(grid)


@pytest.mark.parametrize(
    ("options", "count"),
    [({"angle": 0.0}, 25), ({"shift": 0.0}, 31), ({"angle": 0.0, "shift": 0.0}, 1), ({"angles": 3, "shifts": 1}, 3),
     ({"draws": 1}, 2), ({"draws": 10}, 11), ({}, 775)],
)  # fmt: skip
def test_the_count_of_queries_is_exact(options, count):
    def never(flat):
        return torch.stack([flat.sum(1) * 0 + 5, flat.sum(1) * 0], 1)

    x = images((1, 8, 8), 2)
    outcome = run(Probe(never), Spatial(**options), Unbounded(), x, torch.zeros(2, dtype=torch.int64), width=1)
    assert outcome.forward.tolist() == [count, count]
    assert not outcome.found.any()


@pytest.mark.parametrize(("shape", "shift"), [((1, 8, 8), 1), ((1, 28, 28), 3), ((3, 32, 32), 3), ((3, 20, 50), 5)])
def test_left_out_the_shift_is_a_tenth_of_the_longer_side(shape, shift):
    x = images(shape, 1)
    got = asked(Spatial(angle=0.0, shifts=3), x, torch.tensor([3]))
    said = asked(Spatial(angle=0.0, shift=float(shift), shifts=3), x, torch.tensor([3]))
    assert torch.equal(got, said)
    assert len(got) == 9
    assert any(torch.equal(point[None], moved(x, down=shift)) for point in got)


@pytest.mark.parametrize("targeted", [False, True])
def test_the_mildest_that_fools_is_kept(targeted):
    """One bright pixel at (3, 2); who sees it at (3, 4) or (3, 3) is fooled: one to the right comes first."""
    x = torch.zeros(2, 1, 8, 8)
    x[:, 0, 3, 2] = 1.0

    def logits(flat):
        return torch.stack([flat[:, 0] * 0, flat[:, 3 * 8 + 4] - 0.9, flat[:, 3 * 8 + 3] - 0.9], 1)

    y = torch.zeros(2, dtype=torch.int64)
    targets = torch.tensor([[1], [2]]) if targeted else None
    got = run(Probe(logits), Spatial(angle=0.0, shift=2.0), Unbounded(), x, y, targets=targets)
    assert got.found.all()
    right = [2, 1] if targeted else [1, 1]
    assert all(torch.equal(got.best[row], moved(x, right=right[row])[row]) for row in range(2))
    assert not run(Probe(logits), Spatial(angle=0.0, shift=0.5), Unbounded(), x, y, targets=targets).found.any()


def test_draws_are_uniform_in_angle_and_shift():
    """A ramp betrays its angle, a blob its shift: bilinear interpolation keeps both exactly."""
    i, j = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    ramp = asked(Spatial(draws=1500, shift=0.0), (0.3 + j / 40)[None, None], torch.tensor([5]))[1:, 0].double()
    east, south = ramp[:, 7, 8] - ramp[:, 7, 7], ramp[:, 8, 7] - ramp[:, 7, 7]
    degrees = torch.rad2deg(torch.atan2(-south, east))
    assert stats.kstest(degrees.numpy(), stats.uniform(-30, 60).cdf).pvalue > 0.01
    blob = torch.zeros(1, 1, 16, 16)
    blob[0, 0, 7, 7] = 1.0
    spots = asked(Spatial(draws=1500, angle=0.0, shift=3.0), blob, torch.tensor([6]))[1:, 0].double()
    down, right = (spots * i).sum((1, 2)) - 7, (spots * j).sum((1, 2)) - 7
    for shift in (down, right):
        assert stats.kstest(shift.numpy(), stats.uniform(-3, 6).cdf).pvalue > 0.01
    assert abs(np.corrcoef(down, right)[0, 1]) < 0.1


def test_rows_and_restarts_draw_anew():
    x = images((1, 8, 8), 1)
    one, two = (asked(Spatial(draws=5), x, torch.tensor([key])) for key in (1, 2))
    assert torch.equal(one[0], two[0])
    assert (one[1:] != two[1:]).flatten(1).any(1).all()


def test_the_outside_is_the_low_bound():
    x = torch.ones(1, 1, 4, 4)
    got = asked(Spatial(angle=0.0, shift=1.0, shifts=3), x, torch.tensor([1]), Unbounded((-1.0, 1.0)))
    assert {-1.0, 1.0} == set(got.flatten().tolist())


@pytest.mark.parametrize("options", [{"angles": 30}, {"shifts": 0}, {"draws": 0}])
def test_a_list_without_sense_is_refused(options):
    with pytest.raises(UsageError, match="expected"):
        Spatial(**options)
