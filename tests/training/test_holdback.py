"""Training images held back: never trained on, attacked at each line, and the weights of the best line kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import sparring
from sparring.attacks.pgd import PGD
from sparring.core.defense import Moment
from sparring.core.errors import UsageError
from sparring.core.model import Model
from sparring.core.threat import Linf
from sparring.data import Dataset, load
from sparring.data.images import Images
from sparring.defenses.standard import Standard
from sparring.models.torch import TorchModel
from sparring.training import fit as module
from sparring.training.fit import Line, Settings, fit
from sparring.training.holdback import HoldBack, best

HELD = 200
QUICK = HoldBack(HELD, Linf(0.15), PGD(steps=3))
SETTINGS = Settings("dense", 60, every=10, rate=0.1)  # plain training at this rate peaks early


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


@pytest.fixture(scope="module")
def done(digits, tmp_path_factory):
    return fit(SETTINGS, digits, Standard(), tmp_path_factory.mktemp("whole") / "a", hold_back=QUICK)


class Killed(Exception):
    pass


def killed_at(step: int, path: Path, data: Dataset, hold_back: HoldBack = QUICK) -> None:
    def stop(now: int) -> None:
        if now == step:
            raise Killed

    with pytest.raises(Killed):
        fit(SETTINGS, data, Standard(), path, hold_back=hold_back, on_step=stop)


def weights(net: nn.Module) -> dict[str, Tensor]:
    return net.state_dict()


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_the_last_rows_are_never_trained_on(digits, tmp_path):
    @dataclass(frozen=True)
    class Spy(Standard):
        def loss(self, net: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Tensor:
            seen.append(x)
            return super().loss(net, x, y, moment)

    seen: list[Tensor] = []
    fit(Settings("dense", 12, batch_size=200), digits, Spy(), tmp_path / "a", hold_back=QUICK)
    shown = {row.numpy().tobytes() for batch in seen for row in batch}
    images = [row.numpy().tobytes() for row in digits.train.x]
    assert shown <= set(images[:-HELD])
    assert len(shown) >= 1200  # all but those that do not fill a minibatch
    assert len(images) == 1437


def test_the_robust_accuracy_is_that_of_the_attack_on_those_rows(digits, done):
    rows = digits.train.select(torch.arange(len(digits.train))[-HELD:])
    found = sparring.attack(done.net, rows.x, rows.y, QUICK.attack, QUICK.threat, sample=rows.ids)
    assert done.card["robust_accuracy"] == pytest.approx(found.robust_accuracy)
    assert 0 < found.robust_accuracy < 1


def test_the_weights_are_those_of_the_best_line(digits, done, tmp_path):
    shares = {line["step"]: line["robust"] for line in done.card["log"]}
    at = done.card["best_step"]
    assert list(shares) == [10, 20, 30, 40, 50, 60]
    assert done.card["steps"] == 60
    assert shares[at] == max(shares.values()) == done.card["robust_accuracy"]
    assert at < 60
    assert {"accuracy": done.card["accuracy"], "loss": done.card["loss"]}.items() <= done.card["log"][
        at // 10 - 1
    ].items()
    killed_at(at + 1, tmp_path / "a", digits)
    stored = load_file(tmp_path / "a.partial")
    assert same(weights(done.net), {name[4:]: t for name, t in stored.items() if name.startswith("net.")})


def test_the_training_goes_as_it_would_without_looking(digits, done, tmp_path):
    fewer, held = QUICK.split(digits)
    assert torch.equal(held.ids, digits.train.ids[-HELD:])
    alone = fit(SETTINGS, fewer, Standard(), tmp_path / "a")
    assert [line["loss"] for line in alone.card["log"]] == [line["loss"] for line in done.card["log"]]


def test_without_images_held_back_nothing_is_new(digits, tmp_path):
    card = fit(Settings("dense", 4, every=2), digits, Standard(), tmp_path / "a").card
    assert "hold_back" not in card["plan"]
    assert all(line.keys() == {"step", "loss", "accuracy"} for line in card["log"])
    assert not {"robust_accuracy", "best_step"} & card.keys()
    assert card["steps"] == 4


def test_a_stopped_training_goes_on_to_the_same_weights_and_lines(digits, done, tmp_path):
    at = done.card["best_step"]
    killed_at(at + 15, tmp_path / "a", digits)  # the best line is behind the last checkpoint
    lines: list[Line] = []
    resumed = fit(SETTINGS, digits, Standard(), tmp_path / "a", hold_back=QUICK, on_line=lines.append)
    for key in ("weights_sha256", "log", "best_step", "robust_accuracy", "plan"):
        assert resumed.card[key] == done.card[key]
    assert [line.robust for line in lines] == [line["robust"] for line in done.card["log"]]
    assert str(lines[0]).endswith(f", Robust: {lines[0].robust:.6f}")


def test_another_plan_is_refused(digits, done):
    for other in (None, HoldBack(HELD, Linf(0.2), PGD(steps=3)), HoldBack(HELD, Linf(0.15), PGD(steps=3), 2)):
        with pytest.raises(UsageError, match="made with another hold_back"):
            fit(SETTINGS, digits, Standard(), done.path, hold_back=other)


@dataclass(frozen=True)
class Scripted(HoldBack):
    """Robust accuracies by the book."""

    shares: tuple[float, ...] = (0.1, 0.5, 0.2, 0.5, 0.9, 0.9)

    def robust_accuracy(self, model: Model, images: Images, seed: int, device: str = "cpu") -> float:
        told.append(self.shares[len(told)])
        return told[-1]


told: list[float] = []


@pytest.mark.parametrize(("patience", "steps", "at"), [(1, 30, 20), (2, 40, 20), (3, 60, 50), (None, 60, 50)])
def test_the_training_ends_after_so_many_lines_without_gain(digits, tmp_path, patience, steps, at):
    told.clear()
    held = Scripted(HELD, Linf(0.2), PGD(steps=3), patience)
    card = fit(SETTINGS, digits, Standard(), tmp_path / "a", hold_back=held).card
    assert (card["steps"], card["best_step"], len(told)) == (steps, at, steps // 10)


def test_a_training_killed_as_it_ended_takes_no_further_step(digits, tmp_path, monkeypatch):
    held = Scripted(HELD, Linf(0.2), PGD(steps=3), 2)
    told.clear()
    whole = fit(SETTINGS, digits, Standard(), tmp_path / "b", hold_back=held)

    def refuse(*_: object) -> None:
        raise Killed

    told.clear()
    with monkeypatch.context() as patched:
        patched.setattr(module, "store", refuse)
        with pytest.raises(Killed):
            fit(SETTINGS, digits, Standard(), tmp_path / "a", hold_back=held)
    steps: list[int] = []
    resumed = fit(SETTINGS, digits, Standard(), tmp_path / "a", hold_back=held, on_step=steps.append)
    assert steps == []
    assert resumed.card["weights_sha256"] == whole.card["weights_sha256"]
    assert resumed.card["cost_of_plain"] > 0


def test_the_first_of_equals_is_the_best():
    assert best([0.1, 0.5, 0.5]) == 1
    assert best([0.0]) == 0


class Broken(nn.Module):
    """Right about every image; has no answer for those whose first pixel is `bad` or more."""

    def __init__(self, bad: float) -> None:
        super().__init__()
        self.bad = bad

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, 0, 0, 0]
        right = torch.stack([first * 0 + 50, x.mean((1, 2, 3))], 1)
        return right.masked_fill((first >= self.bad)[:, None], torch.nan)


@pytest.mark.parametrize(("bad", "wanted"), [(2.0, 1.0), (0.5, 0.75), (0.0, 0.0)])
def test_an_image_without_an_answer_does_not_hold(bad, wanted):
    x = torch.full((8, 1, 2, 2), 0.3)
    x[:2, 0, 0, 0] = 0.8
    images = Images("few", x, torch.zeros(8, dtype=torch.int64), torch.arange(8), ("0", "1"))
    held = HoldBack(8, Linf(0.05), PGD(steps=3))
    assert held.robust_accuracy(TorchModel(Broken(bad).eval()), images, 0) == wanted


@pytest.mark.parametrize(("rows", "patience"), [(0, None), (5, 0)])
def test_what_cannot_be_meant_is_refused(rows, patience):
    with pytest.raises(UsageError, match="at least 1"):
        HoldBack(rows, Linf(0.1), PGD(), patience)


def test_some_images_must_be_left(digits, tmp_path):
    with pytest.raises(UsageError, match="fewer than all 1437"):
        fit(SETTINGS, digits, Standard(), tmp_path / "a", hold_back=HoldBack(1437, Linf(0.1), PGD()))
