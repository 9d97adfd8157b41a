"""The threat model of a patch: what its mask lets change, and nothing else."""

from __future__ import annotations

import math

import pytest
import torch

from sparring.core import noise
from sparring.core.errors import UsageError
from sparring.core.patch import Patch

MASK = torch.zeros(2, 1, 3, 4, dtype=torch.bool)
MASK[0, :, 0, :2] = True
MASK[1, :, 2, 3] = True
X0 = noise.uniform(torch.arange(2), (3, 3, 4))


def changed(row, where, value):
    x = X0.clone()
    x[row, 1][where] = value
    return x


def test_each_row_has_a_mask_of_its_own():
    patch = Patch(mask=MASK)
    assert patch.contains(changed(0, (0, 1), 1.0), X0).tolist() == [True, True]
    assert patch.contains(changed(1, (0, 1), 1.0), X0).tolist() == [True, False]
    one = Patch(mask=MASK[:1])
    assert one.contains(changed(1, (0, 1), 1.0), X0).tolist() == [True, True]
    assert one.contains(changed(1, (2, 3), 1.0), X0).tolist() == [True, False]


def test_outside_the_mask_not_one_bit_may_change_inside_only_legal_values():
    patch = Patch(mask=MASK)
    nearly = X0.nextafter(torch.tensor(2.0))
    assert not patch.contains(nearly, X0).any()
    for value, legal in ((0.0, True), (1.0, True), (1.0001, False), (-0.0001, False), (math.nan, False)):
        assert bool(patch.contains(changed(0, (0, 0), value), X0)[0]) is legal
    assert Patch(mask=MASK, bounds=(-1.0, 2.0)).contains(changed(0, (0, 0), 1.7), X0).all()


def test_projections_samples_and_the_box_agree():
    patch = Patch(mask=MASK, bounds=(0.0, 1.0))
    wild = noise.normal(torch.tensor([4, 5]), (3, 3, 4)) * 3
    near = patch.project(wild, X0)
    assert patch.contains(near, X0).all()
    assert torch.equal(near, torch.where(MASK, wild.clamp(0, 1), X0))
    low, high = patch.box(X0)
    assert torch.equal(near, wild.clamp(low, high))
    drawn = patch.sample(X0, torch.tensor([8, 9]))
    assert patch.contains(drawn, X0).all()
    assert ((drawn != X0) == MASK).all()
    assert patch.distance(near, X0).tolist() == pytest.approx((near - X0).flatten(1).norm(dim=1).tolist())


def test_it_says_what_it_is_and_is_not_another():
    patch = Patch(mask=MASK)
    assert patch.describe() == "patch of 2 pixels"
    assert Patch(mask=MASK.expand(2, 3, 3, 4)).describe() == "patch of 2 pixels"
    assert patch == patch  # it must not look at the mask's truth
    assert patch != Patch(mask=~MASK)
    assert patch.eps == math.inf


def test_what_is_no_mask_is_refused():
    with pytest.raises(UsageError, match="expected a bool mask"):
        Patch(mask=MASK.float())
    with pytest.raises(UsageError, match="expected a bool mask"):
        Patch(mask=MASK[0, 0])
    for wrong in (MASK[:, :, :2], torch.cat([MASK, MASK]), MASK.expand(2, 2, 3, 4)):
        with pytest.raises(UsageError, match="expected a mask for images"):
            Patch(mask=wrong).contains(X0, X0)
    with pytest.raises(UsageError, match="low < high"):
        Patch(mask=MASK, bounds=(1.0, 0.0))
