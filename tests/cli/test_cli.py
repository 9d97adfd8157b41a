"""The command line, run as a person runs it: words in; text, JSON and exit codes out."""

import json
import subprocess
import sys

import numpy as np
import pytest

NET = """
import torch
from torch import nn

def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()

def probabilities():
    return nn.Sequential(linear(), nn.Softmax(1)).eval()

def dropout():
    return nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, 10))

def nan():
    net = linear()
    net[1].weight.data.fill_(float("nan"))
    return net

def wrong_shape():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).eval()

def one_logit():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 1)).eval()

def no_module():
    return 3

def raises():
    raise ValueError("no such weights")
"""


def run(*words, cwd=None, env=None):
    command = [sys.executable, "-c", "from sparring.cli.main import main; main()", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli")
    (path / "net.py").write_text(NET)
    done = run("train", "--data", "digits", "--net", "conv", "--steps", "300", "--out", path / "run", "--json")
    assert done.returncode == 0, done.stderr
    (path / "train.json").write_text(done.stdout)
    (path / "train.err").write_text(done.stderr)
    return path


def test_train_json_alone_on_standard_output(folder):
    said = json.loads((folder / "train.json").read_text())
    assert {"accuracy", "loss", "steps", "seconds", "checkpoint"} <= said.keys()
    assert said["steps"] == 300
    assert said["accuracy"] > 0.85
    assert "Step: 300, Loss: " in (folder / "train.err").read_text()


def test_train_prints_the_original_line(tmp_path):
    done = run("train", "--data", "digits", "--net", "dense", "--steps", "100", "--out", tmp_path / "r")
    assert done.stdout.startswith("Step: 100, Loss: ")
    assert ", Accuracy: 0." in done.stdout


def test_attack_a_checkpoint(folder, tmp_path):
    words = ("attack", folder / "run", "--attack", "fgsm", "--attack", "pgd:steps=5", "--eps", "0.2")
    done = run(*words, "--limit", "40", "--json", "--out", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["rows"] == 40
    assert [entry["name"] for entry in said["attacks"]] == ["fgsm", "pgd:steps=5"]
    assert (
        said["worst_case_accuracy"] <= min(1 - e["success"] * said["clean_accuracy"] for e in said["attacks"]) + 1e-6
    )
    before = (tmp_path / "r/report.html").read_bytes()
    (tmp_path / "r/report.html").unlink()
    (tmp_path / "r/result.json").unlink()
    assert run("report", tmp_path / "r").returncode == 0
    assert (tmp_path / "r/report.html").read_bytes() == before
    assert json.loads((tmp_path / "r/result.json").read_text())["attack"]["rows"] == 40


def test_attack_a_function(folder, tmp_path):
    words = ("--attack", "fgsm", "--data", "digits", "--eps", "0.1", "--limit", "5", "--json", "--out")
    by_file = run("attack", f"{folder / 'net.py'}:linear", *words, tmp_path / "a")
    by_name = run("attack", "net:linear", *words, tmp_path / "b", cwd=folder)
    assert by_file.returncode == by_name.returncode == 0, by_file.stderr + by_name.stderr
    a, b = (json.loads(done.stdout)["attacks"][0] for done in (by_file, by_name))
    assert a["success"] == b["success"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["atack"], 2, "did you mean 'attack'"),
        (["attack", "RUN", "--attack", "pdg", "--eps", "0.1"], 2, "did you mean 'pgd'"),
        (["attack", "RUN", "--attack", "pgd:step=3", "--eps", "0.1"], 2, "did you mean 'steps'"),
        (["attack", "RUN", "--attack", "pgd"], 2, "expected --eps"),
        (["attack", "RUN", "--attack", "pgd", "--eps", "-1"], 2, "expected eps >= 0, got -1.0"),
        (["attack", "RUN", "--attack", "pgd", "--eps", "nan"], 2, "expected eps >= 0, got nan"),
        (["attack", "RUN", "--attack", "pgd", "--eps", "1", "--norm", "linv"], 2, "did you mean 'linf'"),
        (["attack", "RUN", "--attack", "pgd", "--eps", "1", "--data", "digit"], 2, "did you mean 'digits'"),
        (["attack", "RUN", "--attack", "pgd", "--eps", "1", "--data", "none.npz"], 2, "none.npz"),
        (
            ["attack", "RUN", "--attack", "pgd", "--eps", "1", "--data", "BIG"],
            2,
            "got a maximum of 255.0; divide by 255",
        ),
        (["attack", "RUN", "--attack", "pgd", "--eps", "1", "--device", "gpu"], 2, "unknown device"),
        (["attack", "missing.safetensors", "--attack", "pgd", "--eps", "1"], 2, "no such file"),
        (["attack", "NET:linea", "--attack", "pgd", "--eps", "1", "--data", "digits"], 2, "did you mean 'linear'"),
        (
            ["attack", "NET:probabilities", "--attack", "pgd", "--eps", "1", "--data", "digits"],
            4,
            "got probabilities",
        ),
        (["attack", "NET:dropout", "--attack", "pgd", "--eps", "1", "--data", "digits"], 4, "call net.eval()"),
        (["attack", "NET:nan", "--attack", "pgd", "--eps", "1", "--data", "digits"], 4, "expected finite logits"),
        (["attack", "NET:wrong_shape", "--attack", "pgd", "--eps", "1", "--data", "digits"], 4, "failed on images"),
        (["attack", "NET:one_logit", "--attack", "pgd", "--eps", "1", "--data", "digits"], 4, "classes >= 2"),
        (["attack", "NET:no_module", "--attack", "pgd", "--eps", "1", "--data", "digits"], 4, "got int"),
        (["attack", "NET:raises", "--attack", "pgd", "--eps", "1", "--data", "digits"], 4, "no such weights"),
        (["attack", "NET:linear", "--attack", "pgd", "--eps", "1"], 2, "expected --data"),
        (["attack", "RUN", "--attack", "fooling", "--eps", "1"], 2, "expected no --eps"),
        (["attack", "RUN", "--attack", "fooling", "--eps", "1", "--norm", "l2"], 4, "works in unbounded"),
        (["attack", "RUN", "--attack", "pgd", "--eps", "0.1", "--target", "ten"], 2, "expected --target"),
        (["train", "--data", "digits", "--net", "cnov"], 2, "did you mean 'conv'"),
        (["train", "--data", "digits", "--recipe", "madri"], 2, "did you mean 'madry'"),
        (["train", "--data", "digits", "--recipe", "madry"], 2, "expected --eps"),
        (["train", "--data", "digits", "--steps", "0"], 2, "greater than or equal to 1"),
        (["report", "nowhere"], 2, "expected a run folder"),
    ],
)
def test_bad_input_is_one_clear_line_and_the_right_code(folder, tmp_path, words, code, said):
    big = tmp_path / "big.npz"
    np.savez(big, x=np.full((2, 1, 8, 8), 255.0), y=np.array([0, 1]))
    places = {"RUN": folder / "run", "NET": folder / "net.py", "BIG": big}
    words = [str(places.get(w, w)).replace("NET:", f"{folder / 'net.py'}:") for w in words]
    done = run(*words, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    if code == 4:
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_corrupt_checkpoint_is_told_apart(folder, tmp_path):
    weights = (folder / "run/conv.safetensors").read_bytes()
    (tmp_path / "conv.safetensors").write_bytes(weights[:-4])
    (tmp_path / "conv.json").write_text((folder / "run/conv.json").read_text())
    done = run("attack", tmp_path / "conv.safetensors", "--attack", "pgd", "--eps", "0.1")
    assert done.returncode == 2
    assert "expected sha256" in done.stderr


def test_ls_json_lists_what_there_is():
    said = json.loads(run("ls", "--json").stdout)
    names = [entry["name"] for entry in said["attacks"]]
    assert {"fgsm", "fooling", "pgd", "apgd"} <= set(names)
    assert all({"access", "norms", "version", "paper"} <= entry.keys() for entry in said["attacks"])
    assert {"standard", "madry"} <= {entry["name"] for entry in said["defenses"]}


def test_two_classes_and_one_row(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "two.npz", x=rng.random((20, 1, 8, 8)).astype("float32"), y=np.arange(20) % 2)
    done = run("train", "--data", tmp_path / "two.npz", "--net", "dense", "--steps", "50", "--out", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    words = ("--attack", "apgd:loss=dlr", "--eps", "0.5", "--data", tmp_path / "two.npz", "--limit", "1", "--json")
    done = run("attack", tmp_path / "r", *words, "--out", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 1


def test_no_colour_and_no_bars_off_a_terminal(folder, tmp_path):
    words = ("attack", folder / "run", "--attack", "fgsm", "--eps", "0.1", "--limit", "4", "--out", tmp_path / "r")
    done = run(*words)
    assert "\x1b[" not in done.stdout + done.stderr


def test_help_names_the_commands():
    done = run("--help")
    assert done.returncode == 0
    for name in ("demo", "train", "attack", "report", "ls"):
        assert name in done.stdout
