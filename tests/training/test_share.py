"""Several processes that share every minibatch: the weights of one process, up to rounding."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector
from typer.testing import CliRunner

from sparring import catalog
from sparring.attacks.pgd import PGD
from sparring.cli.commands import train
from sparring.cli.main import build as program
from sparring.core import noise
from sparring.core.defense import Defense, Moment, Whole
from sparring.core.errors import UsageError
from sparring.core.threat import Linf
from sparring.data import Dataset, load
from sparring.defenses.awp import AWP
from sparring.defenses.crown_ibp import CrownIBP
from sparring.defenses.distillation import Distillation, Temperature
from sparring.defenses.fast import Fast
from sparring.defenses.free import Free
from sparring.defenses.gaussian import Gaussian
from sparring.defenses.ibp import IBP
from sparring.defenses.label_smoothing import LabelSmoothing
from sparring.defenses.madry import Madry
from sparring.defenses.mart import MART
from sparring.defenses.mtl_ibp import MTLIBP
from sparring.defenses.standard import Standard
from sparring.defenses.trades import TRADES
from sparring.models.checkpoint import Checkpoint
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


@dataclass(frozen=True)
class Ranked(Standard):
    """A recipe of a user's own: the hardest half of the minibatch alone."""

    name: ClassVar[str] = "ranked"
    whole: ClassVar[bool] = True

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Tensor:
        return cross_entropy(net(x), y, reduction="none").topk(len(x) // 2).values.mean()


REFUSED = [
    (Ranked(), {}, "mean over images.* got ranked"),
    (AWP(Fast(PGD(steps=2), LIMIT, watch=0)), {}, "mean over images.* got awp"),
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


CARD = {"plan": {"recipe": {"options": repr(Temperature())}}, "weights_sha256": ""}
TEACHER = Checkpoint(Path(), build("dense", (1, 8, 8), 10, 1).double(), CARD)
TWO = PGD(steps=2)
RECIPES: list[Defense] = [
    Standard(), Gaussian(), LabelSmoothing(), Temperature(), Distillation(TEACHER), TRADES(LIMIT), IBP(LIMIT),
    MTLIBP(TWO, LIMIT), CrownIBP(LIMIT, beta=0.5), Madry(TWO, LIMIT), MART(TWO, LIMIT), Fast(TWO, LIMIT, watch=0),
    Fast(PGD(steps=10), Linf(0.03), watch=1, tolerance=0), AWP(Madry(TWO, LIMIT)), AWP(TRADES(LIMIT)), Ranked(),
]  # fmt: skip


def test_no_recipe_is_left_out():
    assert {recipe.name for recipe in RECIPES} == set(catalog.defenses()) - {"free"} | {"ranked"}


@pytest.mark.parametrize("recipe", RECIPES, ids=repr)
def test_a_recipe_is_a_mean_over_images_or_claims_that_it_is_not(digits, recipe):
    net, rows = build("dense", (1, 8, 8), 10).double(), digits.train.select(torch.arange(30))
    key = noise.keys(0, rows.ids, torch.zeros_like(rows.ids))
    x = rows.x.double()
    y = net(x).argmax(1)  # all right: the first, which `Fast` watches, falls to ten steps and not to one

    def gradient(share: Share) -> Tensor:
        part = share.of(torch.arange(30))
        loss = recipe.loss(net, x[part], y[part], Moment(1.0, key[part]))
        return len(part) / 30 * parameters_to_vector(torch.autograd.grad(loss, list(net.parameters())))

    whole, parts = gradient(Share()), sum(gradient(Share(rank, 4)) for rank in range(4))
    shareable = float((whole - parts).norm() / whole.norm()) < 1e-6
    assert shareable == (not (isinstance(recipe, Whole) and recipe.whole))


def test_the_command_line_hands_the_devices_on(tmp_path, monkeypatch):
    def listen(*_: object, devices: int, **__: object) -> None:
        raise UsageError(f"{devices} devices")

    monkeypatch.setattr(train, "fit", listen)
    words = ["train", "--data", "digits", "--net", "dense", "--devices", "3", "--out", str(tmp_path / "a")]
    with pytest.raises(UsageError, match="3 devices"):
        CliRunner().invoke(program(), words, catch_exceptions=False)
