"""The whole story on the embedded digits, cut short."""

import json

import pytest

from sparring.data import Dataset, load
from sparring.demo import story
from sparring.demo.stage import Scale, Stage


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "run"
    digits = load("digits")
    scale = Scale(eps=0.2, small=0.1, dense_steps=300, conv_steps=300, hardening_steps=200, rows=60)
    run = story.open_run(out, digits, scale, 0, "cpu", None)
    lines = []
    figures, report = story.tell(Stage(digits, scale, run, say=lines.append))
    return out, figures, report, lines


def test_every_promised_figure_is_there(told):
    out, figures, _, _ = told
    assert figures["train"]["dense"]["accuracy"] > 0.8
    assert figures["train"]["conv"]["accuracy"] > 0.8
    assert figures["fooling"]["min_confidence"] >= 0.9999
    assert figures["fooling"]["reached"] == 20
    assert figures["targeted"]["improved"]["reached"] == figures["targeted"]["improved"]["pairs"] == 90
    assert figures["targeted"]["classic"]["reached"] < 90
    assert figures["targeted"]["improved"]["mean_l2"] > 0
    for model in figures["defend"]["models"].values():
        assert 0 <= model["clean"] <= 1
        curve = list(model["robust"].values())
        assert curve == sorted(curve, reverse=True)
    assert json.loads((out / "result.json").read_text())["fooling"] == figures["fooling"]


def test_improved_is_nearer_on_the_pairs_the_classic_names(told):
    named = told[1]["targeted"]["named"]
    assert named["both_pairs"] > 10
    assert named["improved_mean_l2"] < named["classic_mean_l2"]


def test_hardening_helps_at_its_eps(told):
    models = told[1]["defend"]["models"]
    assert models["madry"]["robust"]["0.2"] > models["undefended"]["robust"]["0.2"]


def test_the_report_shows_the_figures(told):
    page = told[2].read_text()
    assert "90 of 90" in page
    assert "Robust accuracy" in page


def test_it_prints_the_original_lines(told):
    assert any(line.startswith("Step: 100, Loss: ") for line in told[3])


def test_scales_fit_the_kind_of_image():
    import torch

    digits = load("digits")
    assert Scale.fitting(digits).eps == 0.2
    colour = digits.train.select(torch.arange(2))
    wide = type(colour)("c", torch.zeros(2, 3, 32, 32), colour.y, colour.ids, colour.classes)
    assert Scale.fitting(Dataset("c", wide, wide)).eps == pytest.approx(8 / 255)


def test_two_classes_that_the_net_cannot_tell_apart(tmp_path):
    import torch

    digits = load("digits")
    few = digits.train.select(torch.arange(12))
    blank = type(few)("b", few.x * 0, few.y % 2, few.ids, ("0", "1"))
    scale = Scale(eps=0.2, small=0.1, dense_steps=5, conv_steps=5, hardening_steps=5, rows=4)
    data = Dataset("b", blank, blank)
    run = story.open_run(tmp_path / "r", data, scale, 0, "cpu", None)
    figures, report = story.tell(Stage(data, scale, run))
    assert figures["targeted"]["improved"]["pairs"] == 2
    assert report.is_file()
