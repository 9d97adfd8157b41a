"""The cost of a recipe as a multiple of plain training: measured beside it, and without touching it."""

from __future__ import annotations

import time
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from sparring.core.defense import Moment
from sparring.data import load
from sparring.defenses.standard import Standard
from sparring.training import fit as module
from sparring.training.cost import SAMPLES, PlainStep, multiple, timed
from sparring.training.fit import Settings, fit


@pytest.mark.parametrize("steps", [1, 7, 19, 20, 100, 2000, 2019])
def test_so_many_steps_are_timed_spread_over_the_training(steps):
    chosen = [step for step in range(steps) if timed(step, steps)]
    assert min(steps, SAMPLES) <= len(chosen) <= 2 * SAMPLES
    gaps = {after - before for before, after in pairwise(chosen)}
    assert len(gaps) <= 1


def test_the_multiple_counts_dear_steps_and_forgets_one_pause_and_one_spurt():
    assert multiple([]) is None
    assert multiple([8.0, 2.0, 100.0]) == 8.0
    assert multiple([2.0, 2.0, 2.0, 10.0, 10.0, 1000.0]) == 6.0
    assert multiple([2.0, 4.0]) == 3.0


def test_a_plain_step_leaves_net_and_random_numbers_alone():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3)).train()
    before, state = deepcopy(net.state_dict()), torch.get_rng_state()
    plain = PlainStep(net)
    backward: list[Tensor] = []
    net.register_forward_hook(lambda _net, _inputs, logits: logits.register_hook(backward.append) and None)
    plain.take(torch.rand(5, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(5, dtype=torch.int64))
    assert len(backward) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(weight.grad is None for weight in net.parameters())
    assert torch.equal(torch.get_rng_state(), state)


class Clock:
    """Time that passes only where it is told to."""

    now = 0.0
    cold = True  # a plain step after another step takes longer


def test_the_card_has_the_time_of_a_step_over_that_of_a_plain_one(tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Slow(Standard):
        def loss(self, net: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Tensor:
            Clock.now += 7.5
            Clock.cold = True
            return super().loss(net, x, y, moment)

    def take(self: PlainStep, x: Tensor, y: Tensor) -> None:
        Clock.now += 100.0 if Clock.cold else 3.0
        Clock.cold = False
        plain(self, x, y)

    plain = PlainStep.take
    monkeypatch.setattr(PlainStep, "take", take)
    monkeypatch.setattr(time, "perf_counter", lambda: Clock.now)
    assert fit(Settings("dense", 45), load("digits"), Slow(), tmp_path / "a").card["cost_of_plain"] == 2.5


def test_timing_changes_no_weights(tmp_path, monkeypatch):
    digits, settings = load("digits"), Settings("conv", 30)
    one = fit(settings, digits, Standard(), tmp_path / "a").card
    monkeypatch.setattr(module, "timed", lambda step, steps: False)
    two = fit(settings, digits, Standard(), tmp_path / "b").card
    assert one["weights_sha256"] == two["weights_sha256"]
    assert (one["cost_of_plain"] is None, two["cost_of_plain"]) == (False, None)
