"""Several processes that share every minibatch: the weights of one process, up to rounding."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from typer.testing import CliRunner

from sparring.attacks.pgd import PGD
from sparring.cli.commands import train
from sparring.cli.main import build as program
from sparring.core.errors import UsageError
from sparring.core.threat import Linf
from sparring.data import Dataset, load
from sparring.defenses.awp import AWP
from sparring.defenses.fast import Fast
from sparring.defenses.free import Free
from sparring.defenses.madry import Madry
from sparring.defenses.standard import Standard
from sparring.models.nets import build
from sparring.training import fit as module
from sparring.training.fit import Settings, fit
from sparring.training.holdback import HoldBack
from sparring.training.share import Share

LIMIT = Linf(0.1)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


def apart(one: torch.nn.Module, two: torch.nn.Module) -> float:
    """The largest difference of two nets' weights."""
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def test_the_shares_of_a_minibatch_are_all_of_it():
    rows = torch.arange(10, 21)
    parts = [Share(rank, 3).of(rows) for rank in range(3)]
    assert [len(part) for part in parts] == [4, 4, 3]
    assert torch.equal(torch.cat(parts).sort().values, rows)
    assert torch.equal(Share().of(rows), rows)


SETTINGS = Settings("conv", 20, batch_size=33, every=4)  # shares of 17 and 16 images
MADRY = Madry(PGD(steps=2), LIMIT, warmup=0)
HELD = HoldBack(100, Linf(1.0), PGD(steps=3), patience=1)  # nothing holds: the first line is the best


@pytest.fixture(scope="module")
def two(digits, tmp_path_factory):
    return fit(SETTINGS, digits, MADRY, tmp_path_factory.mktemp("two") / "a", hold_back=HELD, devices=2)


def test_two_processes_train_to_the_weights_of_one(digits, tmp_path, two):
    one = fit(SETTINGS, digits, MADRY, tmp_path / "one", hold_back=HELD)
    untrained = build("conv", (1, 8, 8), 10, 0)
    assert two.card["best_step"] == 4
    assert apart(one.net, two.net) < 5e-5  # wrongly averaged gradients: 1e-2
    assert apart(one.net, untrained) > 1e-2
    assert two.card["plan"] == one.card["plan"]
    assert (one.card["devices"], two.card["devices"]) == (1, 2)
    assert [line["step"] for line in two.card["log"]] == [4, 8]  # both stop early


class Killed(Exception):
    pass


def test_a_stopped_training_goes_on_to_the_same_weights_and_lines(digits, tmp_path, two):
    def stop(step: int) -> None:
        if step == 6:
            raise Killed

    with pytest.raises(Killed):
        fit(SETTINGS, digits, MADRY, tmp_path / "a", hold_back=HELD, devices=2, on_step=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["a.partial"]
    assert multiprocessing.active_children() == []
    steps: list[int] = []
    resumed = fit(SETTINGS, digits, MADRY, tmp_path / "a", hold_back=HELD, devices=2, on_step=steps.append)
    assert steps == [5, 6, 7, 8]
    for key in ("weights_sha256", "log", "best_step", "steps"):
        assert resumed.card[key] == two.card[key]


def test_the_first_process_alone_looks_and_writes(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(Share, "average", lambda *_: None)
    monkeypatch.setattr(Share, "agree", lambda _share, yes, _device: yes)
    settings = Settings("dense", 4, every=2)
    run = module._Run(Share(1, 2), settings, digits, Standard(), None, tmp_path / "a", "cpu", {})
    module._train(run, lambda step: None, lambda line: pytest.fail("a line was written"))
    assert (run.step, run.log, list(tmp_path.iterdir())) == (4, [], [])


REFUSED = [
    (AWP(Madry(PGD(steps=2), LIMIT)), {}, "mean over images.* got awp"),
    (Fast(PGD(steps=2), LIMIT), {}, "mean over images.* got fast"),
    (Free(LIMIT), {}, "mean over images.* got free"),
    (Standard(), {"framework": "tensorflow"}, "a net that torch computes on 2 devices, got tensorflow"),
    (Standard(), {"batch_size": 1}, "an image of each minibatch for each of 2 devices, got 1"),
]


@pytest.mark.parametrize(("defense", "options", "said"), REFUSED, ids=lambda value: getattr(value, "name", None))
def test_what_cannot_be_shared_is_refused_before_anything_starts(digits, tmp_path, defense, options, said):
    with pytest.raises(UsageError, match=said):
        fit(Settings("dense", 2, **options), digits, defense, tmp_path / "a", devices=2)
    assert multiprocessing.active_children() == []


def test_the_command_line_hands_the_devices_on(tmp_path, monkeypatch):
    def listen(*_: object, devices: int, **__: object) -> None:
        raise UsageError(f"{devices} devices")

    monkeypatch.setattr(train, "fit", listen)
    words = ["train", "--data", "digits", "--net", "dense", "--devices", "3", "--out", str(tmp_path / "a")]
    with pytest.raises(UsageError, match="3 devices"):
        CliRunner().invoke(program(), words, catch_exceptions=False)
