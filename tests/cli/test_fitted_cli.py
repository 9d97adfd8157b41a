"""`sparring universal` and `sparring patch`, run as a person runs them."""

import contextlib
import io
import json
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sparring
from sparring.cli.main import main
from sparring.reporting.prints import EDGE

NET = """
import torch
from sklearn.datasets import load_digits
from torch import nn

def nearest_mean():
    digits = load_digits()
    x, y = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
    means = torch.stack([x[y == k].mean(0) for k in range(10)])
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    net[1].weight.data, net[1].bias.data = means, -means.square().sum(1) / 2
    return net.eval()
"""
COMMON = ("--data", "digits", "--fit-rows", "200", "--limit", "80", "--steps", "20", "--json")


def run(*words, cwd=None):
    """The command in this process: torch is loaded once."""
    out, err = io.StringIO(), io.StringIO()
    stay = contextlib.nullcontext() if cwd is None else contextlib.chdir(cwd)
    with stay, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with mock.patch.object(sys, "argv", ["sparring", *map(str, words)]):
                main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("fitted")
    (path / "net.py").write_text(NET)
    done = run("universal", "net.py:nearest_mean", "--eps", "0.15", *COMMON, "--out", "u", cwd=path)
    assert done.returncode == 0, done.stderr
    (path / "u.json").write_text(done.stdout)
    words = ("--size", "4", "--shape", "circle", "--target", "3", "--draws", "3")
    done = run("patch", "net.py:nearest_mean", *words, *COMMON, "--out", "p", cwd=path)
    assert done.returncode == 0, done.stderr
    (path / "p.json").write_text(done.stdout)
    return path


@pytest.fixture(scope="module")
def net(place):
    spaces = {}
    exec((place / "net.py").read_text(), spaces)
    return spaces["nearest_mean"]()


@pytest.fixture(scope="module")
def unseen():
    return sparring.load("digits").test.take(80)


def test_a_universal_perturbation_can_be_judged_again_from_its_evidence(place, net, unseen):
    said, held = json.loads((place / "u.json").read_text()), load_file(place / "u/evidence/universal.safetensors")
    delta = held["delta"]
    assert delta.shape == (1, 8, 8)
    assert delta.abs().max() <= 0.15 + 1e-6
    right = net(unseen.x).argmax(1) == unseen.y
    fell = right & (net((unseen.x + delta).clamp(0, 1)).argmax(1) != unseen.y)
    assert torch.equal(held["fooled"].squeeze(1), fell)
    assert said["held"] == right.sum()
    assert said["rates"]["fitted"] == pytest.approx((fell.sum() / right.sum()).item())
    assert said["rates"]["random noise"] < said["rates"]["fitted"]
    assert sum(entry["rows"] for entry in said["classes"]) == said["held"]
    assert sum(said["named"]) == fell.sum()
    assert said["fit"]["forward"] - said["fit"]["backward"] == 200
    assert said["fit"]["backward"] == 20 * 100
    assert said["forward"] == 80 + said["held"]
    assert said["illegal"] == 0


def test_a_patch_can_be_judged_again_from_its_evidence(place, net, unseen):
    said, held = json.loads((place / "p.json").read_text()), load_file(place / "p/evidence/patch.safetensors")
    assert held["patch"].shape == (1, 4, 4)
    assert held["mask"].sum() == 12
    again = sparring.AdversarialPatch(held["patch"], sparring.Paste(4, "circle"), target=3)
    judged = again.judge(net, unseen, draws=3)
    assert torch.equal(judged.fooled, held["fooled"])
    assert said["rates"]["fitted"] == judged.rate
    assert set(said["rates"]) == {"fitted", "noise", "plain black", "plain grey", "plain white"}
    assert said["control"] == max(list(said["rates"])[1:], key=said["rates"].get)
    assert said["forward"] == 80 + 3 * said["held"]


@pytest.mark.parametrize(("folder", "name"), [("u", "universal"), ("p", "patch")])
def test_the_picture_is_large_and_every_pixel_a_square(place, folder, name):
    picture = Image.open(place / folder / f"{name}.png")
    side = {"universal": 8, "patch": 4}[name]
    assert min(picture.size) >= 1200
    assert picture.info["dpi"] == pytest.approx((300, 300), abs=0.1)
    assert picture.getpixel((0, picture.height // 2)) == (128, 128, 128, 255)  # the line around it
    picture = picture.crop((EDGE, EDGE, picture.width - EDGE, picture.height - EDGE))
    small = picture.resize((side, side), Image.Resampling.NEAREST)
    if name == "universal":
        assert small.resize(picture.size, Image.Resampling.NEAREST).tobytes() == picture.tobytes()
    else:  # see-through outside the circle, and the patch's own grey within
        held = load_file(place / "p/evidence/patch.safetensors")
        pixels = torch.tensor(list(small.tobytes())).view(4, 4, 4)
        assert torch.equal(pixels[..., 3], held["mask"] * 255)
        assert torch.equal(pixels[..., 0], (held["patch"][0] * 255).round().long())


@pytest.mark.parametrize(("folder", "name"), [("u", "universal"), ("p", "patch")])
def test_the_report_tells_it_and_can_be_rebuilt(place, folder, name):
    said, page = json.loads((place / f"{folder}.json").read_text()), (place / folder / "report.html").read_text()
    assert f"{100 * said['rates']['fitted']:.1f} %" in page
    assert f'id="{name}"' in page
    assert page.count("<figure class=") >= len(said["shown"]) + 1
    for stale in ("report.html", "result.json"):
        (place / folder / stale).unlink()
    assert run("report", place / folder).returncode == 0
    assert (place / folder / "report.html").read_text() == page
    assert json.loads((place / folder / "result.json").read_text())[name]["held"] == said["held"]


def test_the_same_command_gives_the_same_bits(place):
    before = (place / "u/evidence/universal.safetensors").read_bytes()
    done = run("universal", "net.py:nearest_mean", "--eps", "0.15", *COMMON[:-1], "--out", "u", cwd=place)
    assert done.returncode == 0, done.stderr
    assert (place / "u/evidence/universal.safetensors").read_bytes() == before
    assert "control: random noise" in done.stdout
    other = run("universal", "net.py:nearest_mean", "--eps", "0.2", *COMMON, "--out", "u", cwd=place)
    assert other.returncode == 2
    assert "choose another --out" in other.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["universal"], 2, "expected --eps"),
        (["universal", "--eps", "0.1", "--norm", "l0"], 2, "linf, l2, l1, not in l0"),
        (["universal", "--eps", "0.1", "--target", "10"], 2, "expected a target from 0 to 9, got 10"),
        (["patch"], 2, "--size"),
        (["patch", "--size", "9"], 2, "a patch of at most 8 pixels, got 9"),
        (["patch", "--size", "3", "--shape", "round"], 2, "unknown patch shape 'round'"),
        (["patch", "--size", "3", "--scale", "2", "1"], 2, "0 < low <= high"),
    ],
)
def test_bad_input_is_one_clear_line(place, tmp_path, words, code, said):
    done = run(words[0], f"{place / 'net.py'}:nearest_mean", *words[1:], *COMMON, "--out", tmp_path / "r")
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
