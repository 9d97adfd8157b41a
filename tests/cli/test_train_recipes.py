"""`sparring train`: every recipe can be named, and what does not suit it is refused in one clear line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparring import catalog
from sparring.cli.main import build
from sparring.core.errors import DataError, UsageError


def told(*words: object) -> dict[str, object]:
    """What a short training prints with --json."""
    options = ["train", "--data", "digits", "--net", "dense", "--steps", "2", "--json"]
    done = CliRunner().invoke(build(), [*options, *map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0
    return json.loads(done.stdout)


def recipe(checkpoint: object) -> str:
    return json.loads(Path(str(checkpoint)).with_suffix(".json").read_text())["plan"]["recipe"]["options"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "run"
    told("--recipe", "temperature:temperature=20", "--out", path)
    return path


LINF, PGD7 = "threat=Linf(eps=0.1, bounds=(0.0, 1.0))", "attack=PGD(steps=7,"
WORDS = {
    "standard": ("standard", "", "Standard()"),
    "madry": ("madry", "--eps 0.1", f"Madry({PGD7}"),
    "trades": ("trades:beta=6", "--eps 0.1", f"TRADES({LINF}, beta=6.0"),
    "fast": ("fast:step=1,watch=8", "--eps 0.1 --attack pgd:steps=2", "Fast(attack=PGD(steps=2,"),
    "free": ("free:replays=2", "--eps 0.1", f"Free({LINF}, replays=2, "),
    "mart": ("mart:beta=5", "--eps 0.1 --attack bim:steps=2", "MART(attack=BIM("),
    "awp": ("awp:inner=trades,gamma=0.005,steps=2", "--eps 0.1", f"AWP(inner=TRADES({LINF}, beta=1.0, steps=2"),
    "gaussian": ("gaussian:sigma=0.5", "", "Gaussian(sigma=0.5)"),
    "label_smoothing": ("label_smoothing", "", "LabelSmoothing(smoothing=0.1)"),
    "ibp": ("ibp:kappa=0.5", "--eps 0.1", f"IBP({LINF}, kappa=0.5, "),
    "crown_ibp": ("crown_ibp:beta=1", "--eps 0.1", f"CrownIBP({LINF}, kappa=0.0, beta=1.0, "),
    "mtl_ibp": ("mtl_ibp:alpha=0.2", "--eps 0.1", f"MTLIBP({PGD7}"),
    "temperature": ("temperature", "", "Temperature(temperature=40.0)"),
    "distillation": ("distillation:temperature=20,teacher=TEACHER", "", "Distillation(teacher="),
}


def test_no_recipe_is_left_out():
    assert set(WORDS) == set(catalog.defenses())


@pytest.mark.parametrize("name", WORDS)
def test_every_recipe_trains(name, teacher, tmp_path):
    text, rest, wanted = WORDS[name]
    trained = told("--recipe", text.replace("TEACHER", str(teacher)), *rest.split(), "--out", tmp_path / "run")
    assert trained["steps"] == 2
    assert recipe(trained["checkpoint"]).startswith(wanted)


def test_how_far_images_are_moved_can_be_said(tmp_path):
    trained = told("--shift", 3, "--out", tmp_path / "run")
    assert json.loads(Path(str(trained["checkpoint"])).with_suffix(".json").read_text())["plan"]["shift"] == 3


def test_images_can_be_held_back(tmp_path):
    words = ("--recipe", "trades", "--eps", 0.1, "--hold-back", 100, "--patience", 1, "--every", 1)
    trained = told(*words, "--out", tmp_path / "run")
    card = json.loads(Path(str(trained["checkpoint"])).with_suffix(".json").read_text())
    held = card["plan"]["hold_back"]["options"]
    assert held.startswith("HoldBack(rows=100, threat=Linf(eps=0.1, bounds=(0.0, 1.0)), attack=PGD(steps=10, ")
    assert held.endswith(", patience=1)")
    assert [line["step"] for line in card["log"]] == [1, 2]
    for key in ("robust_accuracy", "best_step", "cost_of_plain"):
        assert trained[key] == card[key]
    assert trained["robust_accuracy"] == max(line["robust"] for line in card["log"])
    again = told(*words, "--out", tmp_path / "run")
    assert again == trained


def test_awp_takes_its_own_options_and_hands_on_the_rest(tmp_path):
    trained = told("--recipe", "awp:gamma=0.02,inner=mart,beta=3", "--eps", 0.1, "--out", tmp_path / "run")
    said = recipe(trained["checkpoint"])
    assert said.startswith(f"AWP(inner=MART({PGD7}")
    assert "beta=3.0" in said
    assert said.endswith("gamma=0.02)")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("gaussian:sgima=1", "did you mean 'sigma'"),
        ("gaussian:sigma=much", "expected float for sigma"),
        ("gaussian:sigma=-1", "expected sigma >= 0"),
        ("gaussian --eps 0.1", "--eps and --attack are for a recipe that takes them, not for gaussian"),
        ("standard --norm l2", "--norm is for a recipe that takes a threat model"),
        ("trades --eps 0.1 --attack fgsm", "--eps and --attack are for a recipe that takes them"),
        ("fast", "expected --eps for norm linf"),
        ("fast:attack=fgsm --eps 0.1", "expected --attack for the attack of fast, got attack=fgsm"),
        ("mart:threat=0.1", "expected --norm and --eps for the threat of mart"),
        ("madry --eps 3 --norm l0", "got pgd, which works in linf, l2, l1"),
        ("mart --eps 1 --norm l2 --attack fooling", "got fooling, which works towards a class only"),
        ("trades --norm unbounded", "expected a norm with a radius"),
        ("awp --eps 0.1", "expected the recipe that awp is around, such as awp:inner=madry"),
        ("awp:inner=standard", "expected a recipe that trains on points it has sought"),
        ("awp:inner=mdary --eps 0.1", "did you mean 'madry'"),
        ("awp:inner=madry,beta=6 --eps 0.1", "unknown option of madry 'beta'"),
        ("awp:inner=madry", "expected --eps"),
        ("distillation", "train one with --recipe temperature --out TEACHER"),
        ("distillation:teacher=TEACHER", "expected a teacher trained with Temperature(temperature=40.0)"),
        ("temperature:temperature=0", "expected a temperature above 0"),
        ("label_smoothing:smoothing=2", "expected smoothing from 0 to 1"),
        ("ibp", "expected --eps for norm linf"),
        ("ibp --eps 0.1 --attack fgsm", "--eps and --attack are for a recipe that takes them"),
        ("ibp:kappa=2 --eps 0.1", "expected kappa from 0 to 1"),
        ("crown_ibp --norm l1 --eps 1", "expected linf or l2 for the bounds of crown_ibp, got l1"),
        ("mtl_ibp:alpha=-1 --eps 0.1", "expected alpha from 0 to 1"),
        ("free:replays=0 --eps 0.1", "expected each minibatch at least once"),
        ("free --norm l1 --eps 1", "expected linf or l2 for the steps of free, got l1"),
        ("free --eps 0.1 --attack fgsm", "--eps and --attack are for a recipe that takes them"),
        ("awp:inner=free --eps 0.1", "expected a recipe that trains on points it has sought"),
        ("madry --eps 0.1 --patience 2", "expected --hold-back with --patience"),
        ("gaussian --hold-back 100", "expected --eps with --hold-back, and a recipe that takes it"),
        ("madry --eps 0.1 --hold-back 5000", "expected to hold back fewer than all 1437 training images, got 5000"),
    ],
)
def test_what_does_not_suit_a_recipe_is_said(words, said, teacher, tmp_path):
    text = words.replace("TEACHER", str(teacher)).split()
    with pytest.raises(UsageError) as caught:
        told("--recipe", *text, "--out", tmp_path / "run")
    assert said in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="expected a checkpoint"):
        told("--recipe", f"distillation:teacher={tmp_path / 'none'}", "--out", tmp_path / "run")
