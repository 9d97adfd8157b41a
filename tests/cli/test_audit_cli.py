"""`sparring audit` as a person or a CI job runs it: JSON, tables, gates, exit codes, and going on."""

import json
import subprocess
import sys

import pytest

NET = """
import torch
from torch import nn

class Picky(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x):
        if (x[:, 0, 5, 3] > 0.97).any():  # pixels are sixteenths: a small eps does not reach it from elsewhere
            raise KeyError("no word for this pixel")
        return self.net(x)

def picky():
    return Picky().eval()
"""


def run(*words):
    command = [sys.executable, "-c", "from sparring.cli.main import main; main()", "audit", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("audit")
    (path / "net.py").write_text(NET)
    train = "from sparring.cli.main import main; main()"
    words = ["train", "--data", "digits", "--net", "dense", "--steps", "300", "--out", str(path / "net")]
    done = subprocess.run([sys.executable, "-c", train, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def audited(folder):
    done = run(
        folder / "net", "--eps", "0.05", "--limit", "60", "--profile", "quick", "--json", "--out", folder / "a"
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_json_document(audited, folder):
    wanted = {
        "clean_accuracy", "robust_accuracy", "counts", "forward_passes", "backward_passes", "seconds", "warnings",
        "run",
    }  # fmt: skip
    assert wanted <= audited.keys()
    assert set(audited["counts"]) == {"misclassified", "broken", "certified", "undecided", "error"}
    assert sum(audited["counts"].values()) == 60
    proved, undecided = audited["counts"]["certified"], audited["counts"]["undecided"]
    assert audited["robust_accuracy"] == {"lower": proved / 60, "upper": (proved + undecided) / 60}
    assert audited["clean_accuracy"] == 1 - audited["counts"]["misclassified"] / 60
    assert 0 < audited["counts"]["broken"] < 60
    assert audited["run"] == str(folder / "a")
    assert (folder / "a" / "report.html").is_file()
    lines = (folder / "a" / "rows.csv").read_text().splitlines()
    assert len(lines) == 61


def test_the_tables_say_the_same(audited, folder):
    done = run(folder / "net", "--eps", "0.05", "--limit", "60", "--profile", "quick", "--out", folder / "a")
    assert done.returncode == 0
    assert f"broken {audited['counts']['broken']}".split() == [
        word for line in done.stdout.splitlines() if line.strip().startswith("broken") for word in line.split()[:2]
    ]
    proved = audited["counts"]["certified"]
    wanted = f"the lower end: {proved} rows are proved robust" if proved else "the lower end is 0: nothing was proved"
    assert wanted in done.stdout


def test_gates(audited, folder):
    again = (folder / "net", "--eps", "0.05", "--limit", "60", "--profile", "quick", "--out", folder / "a")
    upper = audited["robust_accuracy"]["upper"]
    assert run(*again, "--fail-under", upper).returncode == 0
    failed = run(*again, "--fail-under", upper + 0.01)
    assert failed.returncode == 1
    assert "(--fail-under)" in failed.stderr
    assert run(*again, "--baseline", folder / "a").returncode == 0
    other = run(folder / "net", "--eps", "0.08", "--limit", "60", "--profile", "quick", "--baseline", folder / "a",
                "--out", folder / "b")  # fmt: skip
    assert other.returncode == 2
    assert "made with another threat" in other.stderr


def test_a_drop_below_the_baseline_fails(audited, folder):
    better = json.loads((folder / "a" / "evidence" / "audit.json").read_text())
    base = folder / "base"
    (base / "evidence").mkdir(parents=True)
    (base / "plan.json").write_text((folder / "a" / "plan.json").read_text())
    better["robust_accuracy"]["upper"] += 0.1
    (base / "evidence" / "audit.json").write_text(json.dumps(better))
    again = (folder / "net", "--eps", "0.05", "--limit", "60", "--profile", "quick", "--out", folder / "a")
    assert run(*again, "--baseline", base, "--max-drop", "0.11").returncode == 0
    failed = run(*again, "--baseline", base, "--max-drop", "0.05")
    assert failed.returncode == 1
    assert "(--max-drop)" in failed.stderr


def test_rows_that_the_model_cannot_answer(folder, tmp_path):
    words = ("--data", "digits", "--eps", "0.02", "--limit", "60", "--profile", "quick", "--json")
    done = run(f"{folder / 'net.py'}:picky", *words, "--out", tmp_path / "r")
    assert done.returncode == 3, done.stderr
    said = json.loads(done.stdout)
    assert 0 < said["counts"]["error"] < 30
    assert sum(said["counts"].values()) == 60
    assert all("no word for this pixel" in reason for reason in said["errors"].values())
    assert f"{said['counts']['error']} of 60 rows have no verdict" in done.stderr


def test_a_budget_ends_it_and_the_same_command_goes_on(audited, folder, tmp_path):
    words = (folder / "net", "--eps", "0.05", "--limit", "60", "--profile", "quick", "--out", tmp_path / "r")
    short = run(*words, "--budget", "0.001s", "--json")
    assert short.returncode == 0, short.stderr
    said = json.loads(short.stdout)
    assert not said["complete"]
    assert sum(said["counts"].values()) == 60
    assert said["counts"]["broken"] <= audited["counts"]["broken"]
    whole = json.loads(run(*words, "--json").stdout)
    assert whole["complete"]
    assert whole["counts"] == audited["counts"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--eps", "0.1", "--budget", "soon"), "such as 60s or 5m"),
        (("--eps", "0.1", "--profile", "quik"), "did you mean 'quick'"),
        (("--eps", "0.1", "--norm", "l0"), "not in l0"),
        ((), "expected --eps"),
        (("--eps", "0.1", "--fail-under", "80"), "a share from 0 to 1"),
        (("--eps", "0.1", "--baseline", "nowhere"), "expected a run folder"),
    ],
)
def test_what_cannot_be_meant(words, message, folder, tmp_path):
    done = run(folder / "net", "--limit", "10", "--out", tmp_path / "r", *words)
    assert done.returncode == 2
    assert message in done.stderr
