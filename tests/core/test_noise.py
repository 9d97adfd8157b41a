"""Noise depends on (seed, sample, rank, stream) and on nothing else, and is as random as it claims."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparring.core import noise


def keys(count: int, seed: int = 0, rank: int = 0) -> Tensor:
    return noise.keys(seed, torch.arange(count), torch.full((count,), rank))


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(9)), st.sampled_from([(3,), (1, 5, 7), (2, 4, 4)]), st.integers(0, 50))
@pytest.mark.parametrize("draw", [noise.bits, noise.uniform, noise.normal])
def test_a_row_draws_the_same_bits_in_any_company(draw, order, shape, stream):
    index, key = torch.tensor(order), keys(9)
    together = draw(key, shape, stream)
    assert torch.equal(draw(key[index], shape, stream), together[index])
    assert torch.equal(draw(key[4:5], shape, stream)[0], together[4])


def test_streams_may_differ_from_row_to_row():
    key, streams = keys(3), torch.tensor([5, 0, 9])
    together = noise.bits(key, (4,), streams)
    for row, stream in enumerate(streams.tolist()):
        assert torch.equal(together[row], noise.bits(key[row : row + 1], (4,), stream)[0])


def test_every_part_of_the_address_changes_the_noise():
    base = noise.bits(keys(1), (64,))
    sample = noise.bits(noise.keys(0, torch.tensor([1]), torch.tensor([0])), (64,))
    for other in (noise.bits(keys(1, seed=1), (64,)), noise.bits(keys(1, rank=1), (64,)), sample):
        assert (other != base).all()
    assert (noise.bits(keys(1), (64,), 1) != base).all()


def test_keys_do_not_collide():
    """2^18 keys of neighbouring seeds, samples and ranks are all different."""
    every = [noise.keys(seed, torch.arange(4096), torch.full((4096,), r)) for seed in range(8) for r in range(8)]
    assert len(torch.cat(every).unique()) == 64 * 4096


def test_neighbouring_streams_and_rows_are_uncorrelated():
    u = noise.uniform(keys(64), (4096,)) - 0.5
    later = noise.uniform(keys(64), (4096,), 1) - 0.5
    bound = 5 / math.sqrt(u.numel())  # five standard deviations of a correlation of independent numbers
    for a, b in ((u, later), (u[1:], u[:-1]), (u[:, 1:], u[:, :-1]), (u[1:], later[:-1])):
        assert abs(float((a * b).mean()) * 12) < bound * 1.1


def test_uniform_is_uniform():
    """Kolmogorov-Smirnov at the 0.1 % level, and the exact lattice of 2^-24 in [0, 1)."""
    u = noise.uniform(keys(100), (1000,)).flatten()
    assert u.min() >= 0
    assert u.max() < 1
    assert torch.equal((u * 2**24).round() / 2**24, u)
    ordered, n = u.double().sort().values, u.numel()
    rank = torch.arange(n, dtype=torch.float64)
    gap = torch.maximum(ordered - rank / n, (rank + 1) / n - ordered).max()
    assert float(gap) < 1.95 / math.sqrt(n)


def test_each_bit_is_fair():
    words = noise.bits(keys(64), (1024,)).flatten()
    for bit in range(64):
        ones = int(((words >> bit) & 1).sum())
        assert abs(ones - 32768) < 5 * 128, bit


def test_normal_has_the_moments_of_the_normal():
    z = noise.normal(keys(200), (1000,)).flatten().double()
    n = z.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((z**power).mean()) - moment) < 5 * math.sqrt(variance / n), power
    assert z.isfinite().all()


def test_golden_values():
    """Pinned: whoever changes these changes every stored result, and must raise the attacks' versions."""
    key = noise.keys(7, torch.tensor([0, 1, 99]), torch.tensor([0, 2, 5]))
    assert key.tolist() == GOLDEN_KEYS
    assert noise.bits(key, (2,), 3).tolist() == GOLDEN_BITS
    assert (noise.uniform(key, (2,), 3) * 2**24).long().tolist() == GOLDEN_UNIFORM
    assert (noise.normal(key, (2,), 3).double() * 10**4).round().long().tolist() == GOLDEN_NORMAL


def test_golden_values_by_plain_integers():
    """The same keys from Python integers modulo 2^64: the tensor code has no sign or overflow slip."""
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    def key(seed: int, sample: int, rank: int) -> int:
        base = mix((seed * golden + golden) & mask)
        return mix((mix((base ^ (sample * golden)) & mask) + rank * golden + 1) & mask)

    wanted = [key(7, s, r) for s, r in ((0, 0), (1, 2), (99, 5))]
    assert [k & mask for k in GOLDEN_KEYS] == wanted
    row = [mix((k + 4 * golden) & mask) for k in wanted]
    assert [[b & mask for b in bits] for bits in GOLDEN_BITS] == [
        [mix((r + i * golden) & mask) for i in (1, 2)] for r in row
    ]


GOLDEN_KEYS = [-6402160431604729970, 3422430782634308852, -5991867056698999411]
GOLDEN_BITS = [
    [-7025382471350032022, -5252105884959925910],
    [651563820161112611, 991802591912736695],
    [-3161919963522072827, 5545587999828033146],
]
GOLDEN_UNIFORM = [[10387667, 12000453], [592593, 902039], [13901466, 5043682]]
GOLDEN_NORMAL = [[-9060, -8011], [-1522, -6711], [-5415, 11186]]
