"""`sparring smooth` from words to the run folder, its figures and its page."""

from __future__ import annotations

import csv
import io
import json
import sys
from contextlib import redirect_stdout

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparring.auditing.run import Run
from sparring.certificates.smoothing import largest_radius, lower_bound, smooth
from sparring.cli.commands.smooth import radii
from sparring.cli.main import main
from sparring.data import load
from sparring.models.torch import TorchModel
from sparring.reporting.panels import smoothing as panel

NETS = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    optimiser = torch.optim.Adam(net.parameters(), lr=5e-2)
    from sklearn.datasets import load_digits
    bunch = load_digits()
    x = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(bunch.target)
    for _ in range(60):
        loss = nn.functional.cross_entropy(net(x[:1400]), y[:1400])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net.eval()
"""
ROWS, N, N0, SIGMA, ALPHA = 60, 4000, 50, 0.5, 0.01
ASKED = ("--data", "digits", "--sigma", SIGMA, "--n", N, "--n0", N0, "--alpha", ALPHA, "--limit", ROWS)


def run(*words):
    """The exit code of `sparring` with these words, and the JSON it printed."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.setattr(sys, "argv", ["sparring", *map(str, words)])
        try:
            main()
        except SystemExit as end:
            return end.code or 0, said.getvalue()
    return 0, said.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("smooth")
    (path / "nets.py").write_text(NETS)
    return path


@pytest.fixture(scope="module")
def done(folder):
    code, said = run("smooth", f"{folder}/nets.py:net", *ASKED, "--json", "--out", folder / "run")
    assert code == 0
    return json.loads(said)


@pytest.fixture(scope="module")
def lines(done, folder):
    with (folder / "run/rows.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_figures_are_those_of_the_rows(done, lines):
    assert [int(line["id"]) for line in lines] == list(range(ROWS))
    right = [line for line in lines if line["prediction"] == line["label"] and line["abstained"] == "0"]
    wrong = [line for line in lines if line["prediction"] != line["label"]]
    close = [line for line in lines if line["prediction"] == line["label"] and line["abstained"] == "1"]
    assert (done["claimed"], done["wrong"], done["abstained"]) == (len(right), len(wrong), len(close))
    assert min(len(right), len(wrong)) > 0
    far = [float(line["radius"]) for line in right]
    assert [radius for radius, _ in done["certified"]] == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5]
    assert done["largest_radius"] == pytest.approx(largest_radius(SIGMA, N, ALPHA), abs=1e-6)
    for radius, share in done["certified"]:
        assert share == pytest.approx(sum(r >= radius for r in far) / ROWS, abs=1e-6)
    assert done["average_radius"] == pytest.approx(sum(far) / ROWS, abs=1e-6)
    assert done["forward"] == sum(int(line["forward"]) for line in lines) == ROWS * N0 + (ROWS - len(wrong)) * N


def test_a_row_has_the_radius_of_its_count(lines):
    count = torch.tensor([int(line["count"]) for line in lines])
    lower = lower_bound(count, N, ALPHA)
    torch.testing.assert_close(
        lower, torch.tensor([float(line["lower"]) for line in lines]).double(), rtol=1e-6, atol=0
    )
    radius = torch.where(lower > 0.5, SIGMA * torch.special.ndtri(lower), 0.0)
    told = torch.tensor([float(line["radius"]) for line in lines], dtype=torch.float64)
    torch.testing.assert_close(told, radius, rtol=1e-6, atol=0)
    assert 0 < told.max() <= largest_radius(SIGMA, N, ALPHA)


def test_the_parts_together_are_the_whole(lines):
    spaces: dict = {}
    exec(NETS, spaces)
    images = load("digits").test.take(ROWS)
    net = TorchModel(spaces["net"]())
    whole = smooth(net, images.x, images.y, sigma=SIGMA, n=N, n0=N0, alpha=ALPHA, sample=images.ids)
    assert [int(line["count"]) for line in lines] == whole.count.tolist()
    assert [int(line["prediction"]) for line in lines] == whole.prediction.tolist()


def test_a_run_that_was_cut_short_goes_on(done, folder, tmp_path):
    parts = sorted((folder / "run/evidence").glob("smoothing-*.safetensors"))
    assert len(parts) == 2
    kept = load_file(parts[0])
    kept["radius"] = torch.full_like(kept["radius"], 0.125)  # to be known again
    (tmp_path / "evidence").mkdir()
    save_file(kept, tmp_path / "evidence" / parts[0].name)
    (tmp_path / "plan.json").write_bytes((folder / "run/plan.json").read_bytes())
    code, said = run("smooth", f"{folder}/nets.py:net", *ASKED, "--json", "--out", tmp_path)
    assert code == 0
    with (tmp_path / "rows.csv").open() as file:
        again = list(csv.DictReader(file))
    cut = len(kept["radius"])
    assert 0 < cut < ROWS
    assert {line["radius"] for line in again[:cut]} == {"0.125"}
    with (folder / "run/rows.csv").open() as file:
        assert again[cut:] == list(csv.DictReader(file))[cut:]
    assert json.loads(said)["seconds"] > 0
    code, _ = run("smooth", f"{folder}/nets.py:net", *ASKED, "--seed", 1, "--out", tmp_path)
    assert code == 2


def test_the_page_says_what_kind_of_claim_it_is(done, folder):
    page = (folder / "run/report.html").read_text()
    assert 'id="smoothing"' in page
    assert "digits/test: smoothed by noise</h1>" in page
    assert "This is no proof." in page
    assert "n = 4,000 draws" in page
    assert (
        "holds with probability 1 - alpha = 0.99 per image, for the smoothed classifier, not for the net alone"
        in page
    )
    assert (
        f"Nothing is claimed of {done['abstained']} images whose vote was too close, nor of {done['wrong']}" in page
    )
    assert f"on {ROWS} images at most 0.6 false claims" in page
    assert "Certified accuracy of the smoothed classifier over the L2 radius: " in page
    assert "certified</strong>" not in page  # that is a word for proofs
    (folder / "run/report.html").unlink()
    assert run("report", folder / "run")[0] == 0
    assert (folder / "run/report.html").read_text() == page


def test_the_curve_is_certified_accuracy_at_every_radius(done, folder):
    kept = load_file(folder / "run/evidence/smoothing.safetensors")
    at, shares = panel.steps(kept["radius"], kept["right"])
    for place, radius in enumerate(at):
        beyond = (kept["right"] & (kept["radius"] > radius)).double().mean().item()
        assert shares[place] == pytest.approx(beyond)
    assert at[0] == 0
    assert shares[0] == pytest.approx(done["claimed"] / ROWS)
    assert shares[-1] == 0
    assert panel.steps(torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.bool)) == ([0.0], [0.0])


def test_the_page_does_without_what_is_not_there(done, folder, tmp_path):
    kept, tensors = Run(folder / "run").figures("smoothing"), Run(folder / "run").tensors("smoothing")
    (tmp_path / "plan.json").write_text("{}")
    assert panel.render(Run(tmp_path)) is None
    for missing in kept:
        Run(tmp_path).record("smoothing", {key: value for key, value in kept.items() if key != missing}, tensors)
        assert panel.render(Run(tmp_path))
    (tmp_path / "evidence/smoothing.safetensors").unlink()
    Run(tmp_path).record("smoothing", {"model": "<b>"})
    page = panel.render(Run(tmp_path))
    assert "&lt;b&gt;" in page
    assert "<b>" not in page


@pytest.mark.parametrize(
    ("sigma", "largest", "told"),
    [
        (0.25, 0.8, [0, 0.25, 0.5, 0.75]),
        (0.05, 0.16, [0, 0.05, 0.1, 0.15]),
        (64.0, 200.0, [0, 64, 128, 192]),
        (0.25, 0.0, [0]),
    ],
)
def test_the_table_has_a_handful_of_round_radii(sigma, largest, told):
    assert radii(sigma, largest) == pytest.approx(told)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--sigma", 0], 2, "expected sigma > 0"),
        (["--sigma", 0.1, "--alpha", 1], 2, "expected alpha between 0 and 1"),
        ([], 2, "--sigma"),
        (["--sigma", 0.1, "--n", 0], 2, "--n"),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_nothing(folder, tmp_path, capfd, words, code, said):
    out = tmp_path / "r"
    assert run("smooth", f"{folder}/nets.py:net", "--data", "digits", "--limit", 5, *words, "--out", out)[0] == code
    assert said in capfd.readouterr().err
    assert not out.exists()
