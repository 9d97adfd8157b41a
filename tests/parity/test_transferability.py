"""What a transfer attack carries to the target is each attack's last point, played here by hand."""

from __future__ import annotations

import pytest
import torch

import sparring
from sparring import catalog
from sparring.core import noise
from sparring.core.batch import Batch
from sparring.core.model import Access
from sparring.core.threat import Linf
from sparring.testing import puzzle
from sparring.transferability import FAMILY


@pytest.mark.parametrize("goals", [False, True], ids=["away", "towards"])
@pytest.mark.parametrize("name", FAMILY)
def test_the_target_is_shown_the_last_point(points, name, goals):
    case, attack = puzzle("linf"), catalog.attack(name, steps=4)
    ids = torch.arange(len(case.x))
    target = (case.y + 1) % 4 if goals else torch.full_like(case.y, -1)
    batch = Batch(case.x, case.y, target, noise.keys(9, ids, ids * 0), Linf(0.3))
    played = points(attack, case.model, batch)
    how = {"goal": target if goals else None, "seed": 9}
    carried = sparring.transfer(case.model, case.model, case.x, case.y, [attack], Linf(0.3), **how)
    assert torch.equal(carried.outcomes[0].best, played[-1])
    labels = torch.stack([case.model.query(x, Access.DECISION).labels for x in played[:-1]])
    early = (labels == target if goals else labels != case.y).any(0)
    assert early.sum() >= 3  # who would have left before the end
    assert carried.entries[0].forward == len(played) * len(case.x)
