"""Counter-based noise: what a row draws depends on its key and its step, on nothing else.

A row's key is a hash of (seed, sample, rank); its stream is the step at which it draws. So the same row
gets the same bits alone or in any batch, in any order, on any device. The hash is the SplitMix64 finaliser
(Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", figure 15) on int64 tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def _shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # int64 shifts carry the sign in; the mask takes it out


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return z ^ _shift(z, 31)


def keys(seed: int, sample: Tensor, rank: Tensor) -> Tensor:
    """(n,) int64 noise keys from a seed, (n,) sample ids and (n,) case ranks."""
    base = _mix(torch.full_like(sample, seed) * _GOLDEN + _GOLDEN)
    return _mix(_mix(base ^ (sample * _GOLDEN)) + rank * _GOLDEN + 1)


def bits(key: Tensor, shape: Sequence[int], stream: Tensor | int = 0) -> Tensor:
    """(n, *shape) int64 words of 64 random bits, for (n,) keys and a stream number or (n,) of them."""
    step = stream if isinstance(stream, Tensor) else torch.full_like(key, stream)
    row = _mix(key + (step + 1) * _GOLDEN)
    count = torch.arange(1, math.prod(shape) + 1, device=key.device)
    return _mix(row[:, None] + count * _GOLDEN).view(len(key), *shape)


def uniform(key: Tensor, shape: Sequence[int], stream: Tensor | int = 0) -> Tensor:
    """(n, *shape) float32, uniform on [0, 1) in steps of 2^-24."""
    return _shift(bits(key, shape, stream), 40).float() * 2.0**-24


def normal(key: Tensor, shape: Sequence[int], stream: Tensor | int = 0) -> Tensor:
    """(n, *shape) float32, standard normal (Box and Muller 1958), computed in float64."""
    word = bits(key, shape, stream)
    radius = (-2.0 * ((_shift(word, 33).double() + 1.0) * 2.0**-31).log()).sqrt()
    angle = (word & 0x7FFFFFFF).double() * (2.0 * math.pi * 2.0**-31)
    return (radius * angle.cos()).float()
