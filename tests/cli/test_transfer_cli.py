"""`sparring transfer` from words to the run folder, its figures and its page."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stdout

import pytest
import torch
from safetensors.torch import load_file

from sparring.auditing.run import Run
from sparring.cli.main import main
from sparring.reporting.panels import transfer as panel
from sparring.transferability import FAMILY

NETS = """
import torch
from torch import nn

def net(seed, classes=10):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, classes))
    optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
    from sklearn.datasets import load_digits
    bunch = load_digits()
    x = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(bunch.target)
    for _ in range(100):
        at = torch.randint(0, 1400, (128,))
        loss = nn.functional.cross_entropy(net(x[at]), y[at] % classes)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net.eval()

def one():
    return net(1)

def two():
    return net(2)

def three():
    return net(3)

def four_classes():
    return net(4, 4)
"""


def run(*words):
    """The exit code of `sparring transfer` with these words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sparring", "transfer", *map(str, words)])
        try:
            main()
        except SystemExit as end:
            return end.code or 0
    return 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("transfer")
    (path / "nets.py").write_text(NETS)
    return path


@pytest.fixture(scope="module")
def done(folder):
    words = (
        f"{folder}/nets.py:one",
        "--surrogate",
        f"{folder}/nets.py:two",
        "--surrogate",
        f"{folder}/nets.py:three",
    )
    said = io.StringIO()
    with redirect_stdout(said):
        code = run(*words, "--data", "digits", "--eps", "0.15", "--limit", "50", "--json", "--out", folder / "run")
    assert code == 0
    return json.loads(said.getvalue())


def test_the_whole_family_runs_when_none_is_named(done):
    assert [entry["name"] for entry in done["attacks"]] == list(FAMILY)
    assert [name.rpartition("/")[2] for name in done["surrogates"]] == ["nets.py:two", "nets.py:three"]
    assert done["rows"] == 50
    assert done["held"] == round(50 * done["clean_accuracy"])
    for entry in done["attacks"]:
        assert 0.2 < entry["target"] <= 1
        assert 0.2 < entry["surrogate"] <= 1
        assert entry["queries"] == done["held"]
    worst = min(done["clean_accuracy"] * (1 - entry["target"]) for entry in done["attacks"])
    assert done["worst_case_accuracy"] <= worst + 1e-6


def test_what_is_stored_fools_the_target_as_told(done, folder):
    spaces: dict = {}
    exec(NETS, spaces)
    target = spaces["one"]()
    (path,) = (folder / "run/evidence").glob("transfer.safetensors")
    kept = load_file(path)
    for place, entry in enumerate(done["attacks"]):
        found, labels = kept[f"{place}_found"].bool(), target(kept[f"{place}_images"]).argmax(1)
        untouched = round(50 * (1 - done["clean_accuracy"]))
        assert int(found.sum()) - untouched == round(entry["target"] * done["held"])
        assert len(torch.unique(labels[found])) > 2
    plan = json.loads((folder / "run/plan.json").read_text())
    assert list(plan["surrogates"]) == done["surrogates"]
    assert len({plan["model_digest"], *plan["surrogates"].values()}) == 3


def test_the_page_tells_both_sides(done, folder):
    page = (folder / "run/report.html").read_text()
    assert 'id="transfer"' in page
    assert f"from {', '.join(done['surrogates'])} to {done['model']}" in page
    best = max(done["attacks"], key=lambda entry: entry["target"])
    assert f"{best['name']} travels best" in page
    assert 'aria-label="Success of each attack. ' in page
    assert page.count('class="triptych"') == min(12, round(best["target"] * done["held"]))
    before = (folder / "run/report.html").read_bytes()
    assert panel.render(Run(folder / "run")) in before.decode()


def test_the_page_does_without_what_is_not_there(done, folder, tmp_path):
    kept = Run(folder / "run").figures("transfer")
    for missing in kept:
        (tmp_path / "plan.json").write_text("{}")
        Run(tmp_path).record("transfer", {key: value for key, value in kept.items() if key != missing})
        assert panel.render(Run(tmp_path))
    bare = {"name": "<b>", "surrogate": None, "target": None}
    Run(tmp_path).record("transfer", {"attacks": [bare], "held": 0})
    page = panel.render(Run(tmp_path))
    assert "&lt;b&gt;" in page
    assert "<b>" not in page


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["nets.py:one", "--eps", "0.1"], 2, "--surrogate"),
        (["nets.py:one", "--surrogate", "nets.py:two"], 2, "expected --eps"),
        (["nets.py:one", "--surrogate", "nets.py:tow", "--eps", "0.1"], 2, "did you mean 'two'"),
        (["nets.py:one", "--surrogate", "nets.py:two", "--eps", "0.1", "--attack", "pdg"], 2, "did you mean 'pgd'"),
        (
            ["nets.py:one", "--surrogate", "nets.py:two", "--eps", "1", "--norm", "l1", "--attack", "bim"],
            4,
            "works in linf",
        ),
        (
            ["nets.py:one", "--surrogate", "nets.py:four_classes", "--eps", "0.1"],
            4,
            "surrogates with the 10 classes of the target, got 4",
        ),
    ],
)
def test_bad_input_is_one_clear_line_and_the_right_code(folder, tmp_path, capfd, words, code, said):
    words = [word.replace("nets.py", f"{folder}/nets.py") for word in words]
    assert run(*words, "--data", "digits", "--limit", "5", "--out", tmp_path / "r") == code
    assert said in capfd.readouterr().err
