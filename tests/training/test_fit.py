"""Training: the log, the checkpoint, and going on after a kill."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from sparring.attacks.pgd import PGD
from sparring.core.errors import DataError, UsageError
from sparring.core.threat import Linf
from sparring.data import Dataset, load
from sparring.defenses.madry import Madry
from sparring.defenses.standard import Standard
from sparring.models.checkpoint import open_checkpoint
from sparring.training.augment import shift
from sparring.training.fit import Line, Settings, fit


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def test_learns_and_logs_summed_cross_entropy(digits, tmp_path):
    lines = []
    done = fit(Settings("dense", 300), digits, Standard(), tmp_path / "d.safetensors", on_line=lines.append)
    assert [line.step for line in lines] == [100, 200, 300]
    with torch.no_grad():
        logits = done.net(digits.test.x)
    assert lines[-1].accuracy == pytest.approx((logits.argmax(1) == digits.test.y).double().mean().item())
    summed = torch.nn.functional.cross_entropy(logits, digits.test.y, reduction="sum").item()
    assert lines[-1].loss == pytest.approx(summed, rel=1e-5)
    assert lines[-1].accuracy > 0.85


def test_the_line_is_the_original_one():
    assert str(Line(100, 3136.2863774, 0.9067)) == "Step: 100, Loss: 3136.286377, Accuracy: 0.906700"


class Killed(Exception):
    pass


@pytest.mark.parametrize("defense", [Standard(), Madry(PGD(steps=2), Linf(0.1))])
def test_a_stopped_training_goes_on_to_the_same_weights(digits, tmp_path, defense):
    settings = Settings("conv", 40, every=10)

    def stop(step):
        if step == 25:
            raise Killed

    with pytest.raises(Killed):
        fit(settings, digits, defense, tmp_path / "a.safetensors", on_step=stop)
    assert (tmp_path / "a.partial").exists()
    steps, lines = [], []
    resumed = fit(settings, digits, defense, tmp_path / "a.safetensors", on_step=steps.append, on_line=lines.append)
    whole = fit(settings, digits, defense, tmp_path / "b.safetensors")
    assert steps[0] == 21  # from the last checkpoint, not from the start
    assert [line.step for line in lines] == [10, 20, 30, 40]
    assert resumed.card["weights_sha256"] == whole.card["weights_sha256"]
    assert not (tmp_path / "a.partial").exists()


def test_a_killed_process_goes_on_to_the_same_weights(tmp_path):
    def command(out):
        words = ["train", "--data", "digits", "--net", "dense", "--steps", "1500", "--out", str(tmp_path / out)]
        return [sys.executable, "-c", "from sparring.cli.main import main; main()", *words]

    process = subprocess.Popen(command("run"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run/dense.partial").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run/dense.safetensors").exists()
    digests = []
    for out in ("run", "whole"):
        subprocess.run(command(out), check=True, capture_output=True)
        digests.append(open_checkpoint(tmp_path / out).card["weights_sha256"])
    assert digests[0] == digests[1]


def test_same_plan_returns_the_checkpoint_and_another_is_refused(digits, tmp_path):
    path = tmp_path / "a.safetensors"
    first = fit(Settings("dense", 20), digits, Standard(), path)
    steps = []
    again = fit(Settings("dense", 20), digits, Standard(), path, on_step=steps.append)
    assert steps == []
    assert again.card == first.card
    with pytest.raises(UsageError, match=r"another steps \(steps: 20, now 30\); choose another --out"):
        fit(Settings("dense", 30), digits, Standard(), path)
    with pytest.raises(UsageError, match="recipe"):
        fit(Settings("dense", 20), digits, Madry(PGD(steps=2), Linf(0.1)), path)


def test_seeds_differ_and_repeat(digits, tmp_path):
    digest = [
        fit(Settings("dense", 10, seed=s), digits, Standard(), tmp_path / f"{i}.safetensors").card["weights_sha256"]
        for i, s in enumerate([0, 0, 1])
    ]
    assert digest[0] == digest[1] != digest[2]


@pytest.mark.parametrize("change", [lambda b: b[:-10], lambda b: b[:-1] + bytes([b[-1] ^ 1])])
def test_a_cut_or_changed_checkpoint_is_refused(digits, tmp_path, change):
    path = tmp_path / "a.safetensors"
    fit(Settings("dense", 5), digits, Standard(), path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=r"expected sha256 .* found"):
        open_checkpoint(path)


def test_the_card_says_what_the_weights_are(digits, tmp_path):
    fit(Settings("conv", 5), digits, Standard(), tmp_path / "a.safetensors")
    card = json.loads((tmp_path / "a.json").read_text())
    assert {"net", "shape", "accuracy", "seed", "versions", "weights_sha256", "data"} <= card.keys()
    assert card["shape"] == [1, 8, 8]
    assert card["plan"]["data_sha256"] == digits.train.digest()


def test_one_row_and_two_classes_train(tmp_path):
    digits = load("digits")
    two = (digits.train.y < 2).nonzero().squeeze(1)
    few = Dataset("few", digits.train.select(two[:1]), digits.test.select((digits.test.y < 2).nonzero().squeeze(1)))
    done = fit(Settings("dense", 3), few, Standard(), tmp_path / "a.safetensors")
    assert 0 <= done.card["accuracy"] <= 1


def test_madry_holds_where_plain_training_falls(digits, tmp_path):
    from sparring import attack

    plain = fit(Settings("conv", 300), digits, Standard(), tmp_path / "p.safetensors").net
    hard = fit(Settings("conv", 300), digits, Madry(PGD(steps=5), Linf(0.15)), tmp_path / "m.safetensors").net
    left = [attack(net, digits.test.x, digits.test.y, "apgd", Linf(0.15)).robust_accuracy for net in (plain, hard)]
    assert left[1] > left[0] + 0.2


def test_shift_moves_whole_images_by_few_pixels_and_by_key_alone():
    x = torch.zeros(64, 1, 5, 5)
    x[:, :, 2, 2] = 1
    key = torch.arange(64)
    moved = shift(x, key, 1)
    assert (moved.sum((1, 2, 3)) == 1).all()
    place = moved.flatten(1).argmax(1)
    assert set(place.tolist()) == {6, 7, 8, 11, 12, 13, 16, 17, 18}
    assert torch.equal(shift(x[10:20], key[10:20], 1), moved[10:20])
