"""Structural similarity: beside plain loops and closed forms; what it projects and draws is legal."""

from __future__ import annotations

import math

import pytest
import torch

from sparring.core import noise
from sparring.core.errors import UsageError
from sparring.core.ssim import SSIM
from sparring.core.threat import threat

SHAPES = [(1, 8, 8), (3, 13, 12), (2, 4, 5), (1, 28, 28), (1, 11, 30), (1, 1, 1), (1, 2, 9)]
BOUNDS = [(0.0, 1.0), (0.0, 255.0), (-1.0, 1.0)]


def pair(shape, bounds, rows=2, apart=0.3):
    low, high = bounds
    x0 = noise.uniform(torch.arange(rows) + 3, shape)
    x = (x0 + apart * noise.normal(torch.arange(rows) + 30, shape)).clamp(0, 1)
    return low + (high - low) * x, low + (high - low) * x0


def loops(x, x0, bounds):
    """Mean SSIM of one channel: Wang et al. 2004, equations 13 to 17, weight by weight."""
    height, width = x.shape
    extent = bounds[1] - bounds[0]
    first, second = (((v - bounds[0]).tolist()) for v in (x.double(), x0.double()))
    values = []
    for row in range(height):
        for column in range(width):
            inside = [
                (math.exp(-((i - row) ** 2 + (j - column) ** 2) / (2 * 1.5**2)), first[i][j], second[i][j])
                for i in range(max(0, row - 5), min(height, row + 6))
                for j in range(max(0, column - 5), min(width, column + 6))
            ]
            total = sum(w for w, _, _ in inside)
            window = [(w / total, a, b) for w, a, b in inside]
            one, two = sum(w * a for w, a, _ in window), sum(w * b for w, _, b in window)
            spread = sum(w * (a - one) ** 2 for w, a, _ in window)
            other = sum(w * (b - two) ** 2 for w, _, b in window)
            joint = sum(w * (a - one) * (b - two) for w, a, b in window)
            c1, c2 = (0.01 * extent) ** 2, (0.03 * extent) ** 2
            alike = (2 * one * two + c1) * (2 * joint + c2)
            values.append(alike / ((one**2 + two**2 + c1) * (spread + other + c2)))
    return sum(values) / len(values)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bounds", BOUNDS)
def test_the_distance_is_that_of_plain_loops(shape, bounds):
    x, x0 = pair(shape, bounds)
    wanted = [1 - sum(loops(a, b, bounds) for a, b in zip(one, two, strict=True)) / len(one)
              for one, two in zip(x, x0, strict=True)]  # fmt: skip
    got = threat("ssim", 1.0, bounds).distance(x, x0)
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_image_itself_is_at_distance_zero_and_order_does_not_matter(shape):
    x, x0 = pair(shape, (0.0, 1.0))
    limit = threat("ssim", 0.0)
    assert limit.distance(x0, x0).tolist() == [0.0, 0.0]
    torch.testing.assert_close(limit.distance(x, x0), limit.distance(x0, x), rtol=0, atol=1e-14)
    assert limit.contains(x0, x0).all()
    assert not limit.contains(x, x0).any()


def test_flat_images_differ_in_luminance_alone():
    a, b = torch.full((1, 1, 20, 20), 0.3, dtype=torch.float64), torch.full((1, 1, 20, 20), 0.7, dtype=torch.float64)
    wanted = 1 - (2 * 0.3 * 0.7 + 1e-4) / (0.3**2 + 0.7**2 + 1e-4)
    assert float(threat("ssim", 1.0).distance(a, b)) == pytest.approx(wanted, abs=1e-12)


def test_a_negative_is_as_far_as_can_be():
    x0 = (noise.uniform(torch.arange(1), (1, 32, 32)) > 0.5).float()
    assert 1.9 < float(threat("ssim", 2.0).distance(1 - x0, x0)) <= 2.0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("eps", [0.0, 1e-4, 0.05, 0.4])
def test_what_is_projected_is_legal_and_goes_as_far_as_it_may(shape, bounds, eps):
    x, x0 = pair(shape, bounds, rows=6)
    limit = threat("ssim", eps, bounds)
    got = limit.project(x, x0)
    far = limit.distance(x, x0)
    assert limit.contains(got, x0).all()
    assert torch.equal(limit.project(got, x0), got)
    stays = far <= eps
    assert torch.equal(got[stays], x[stays])
    if eps > 1e-3:
        torch.testing.assert_close(
            limit.distance(got, x0)[~stays], torch.full_like(far, eps)[~stays], rtol=1e-3, atol=0
        )
    moved, whole = (got - x0).flatten(1).double(), (x - x0).flatten(1).double()
    share = (moved * whole).sum(1, keepdim=True) / whole.square().sum(1, keepdim=True)
    assert ((share >= 0) & (share <= 1)).all()
    torch.testing.assert_close(moved, share * whole, rtol=0, atol=3e-7 * (bounds[1] - bounds[0]))


def test_who_stands_on_the_border_stays_and_who_is_out_of_bounds_comes_back():
    x, x0 = pair((1, 12, 12), (0.0, 1.0))
    far = threat("ssim", 2.0).distance(x, x0)
    assert torch.equal(
        threat("ssim", 2.0).within(x, x0, (far - 1e-7).clamp_min(0)), x
    )  # a tenth of what the judge lets pass
    assert not torch.equal(threat("ssim", 2.0).within(x, x0, far - 1e-5), x)
    outside = x.clone()
    outside[:, 0, 0, 0] = 1.5
    assert torch.equal(threat("ssim", 2.0).project(outside, x0), outside.clamp(0, 1))


def test_every_row_has_its_own_radius_and_does_not_hang_on_the_others():
    x, x0 = pair((1, 12, 12), (0.0, 1.0), rows=3)
    limit, radius = threat("ssim", 1.0), torch.tensor([0.01, 0.1, 2.0])
    got = limit.within(x, x0, radius)
    assert limit.distance(got, x0)[:2].tolist() == pytest.approx([0.01, 0.1], rel=1e-3)
    assert torch.equal(got[2], x[2])
    for row in range(3):
        one = slice(row, row + 1)
        assert torch.equal(limit.within(x[one], x0[one], radius[one]), got[one])


@pytest.mark.parametrize("bounds", BOUNDS)
def test_samples_are_legal_different_and_reach_into_the_whole_radius(bounds):
    _, x0 = pair((1, 12, 12), bounds, rows=200)
    limit = threat("ssim", 0.2, bounds)
    draws = [limit.sample(x0, torch.arange(200), stream) for stream in (0, 1)]
    assert not torch.equal(*draws)
    far, again = (limit.distance(draw, x0) for draw in draws)
    assert float((far - again).abs().median()) > 0.02  # a stream has a radius of its own
    assert limit.contains(draws[0], x0).all()
    assert ((far / 0.2).sort().values - torch.linspace(0, 1, 200)).abs().max() < 0.12  # uniform in distance


def test_the_direction_of_a_step_is_the_gradient_of_length_one():
    gradient = noise.normal(torch.arange(3), (1, 5, 5))
    gradient[2] = 0.0
    step = threat("ssim", 0.1).steepest(gradient)
    assert step.flatten(1).norm(dim=1).tolist() == pytest.approx([1.0, 1.0, 0.0], abs=1e-6)
    assert (step[:2] * gradient[:2] >= 0).all()


def test_it_is_reached_by_its_name_and_says_what_it_is():
    limit = threat("ssim", 0.05, (0.0, 255.0))
    assert isinstance(limit, SSIM)
    assert limit.describe() == "ssim eps 0.05"
    assert limit.slack == 1e-6
    assert limit.farthest(torch.zeros(1, 1, 4, 4)) == 2.0  # SSIM is at least -1
    with pytest.raises(UsageError, match="did you mean 'ssim'"):
        threat("sim", 0.1)
    with pytest.raises(UsageError, match="compares two images"):
        limit.length(torch.zeros(1, 4))
