"""`sparring.train`: what is asked of it reaches the training."""

from __future__ import annotations

from typing import Any

import pytest

import sparring
from sparring import api
from sparring.attacks.pgd import PGD
from sparring.data import Dataset, load
from sparring.models.checkpoint import open_checkpoint
from sparring.training.fit import Line
from sparring.training.holdback import HoldBack

HELD = HoldBack(100, sparring.Linf(1.0), PGD(steps=2), patience=1)  # nothing holds: the first line is the best


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


def test_images_can_be_held_back_and_the_lines_heard(digits, tmp_path):
    lines: list[Line] = []
    done = sparring.train("dense", digits, steps=20, every=4, hold_back=HELD, on_line=lines.append)
    assert [(line.step, line.robust) for line in lines] == [(4, 0.0), (8, 0.0)]
    assert (done.card["steps"], done.card["best_step"]) == (8, 4)
    kept = sparring.train("dense", digits, steps=20, every=4, hold_back=HELD, path=tmp_path / "a")
    assert kept.card["weights_sha256"] == done.card["weights_sha256"]
    assert open_checkpoint(tmp_path / "a.safetensors").card == kept.card
    assert not done.path.exists()


def test_the_devices_are_handed_on(digits, monkeypatch):
    seen: dict[str, Any] = {}
    monkeypatch.setattr(api, "fit", lambda *_, **options: seen.update(options))
    sparring.train("dense", digits, device="cuda", devices=3)
    assert (seen["device"], seen["devices"], seen["hold_back"]) == ("cuda", 3, None)
