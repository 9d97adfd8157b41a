"""`sparring compare` as a person runs it."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

NET = """
import torch
from torch import nn

def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
"""


def run(*words, cwd):
    command = [sys.executable, "-c", "from sparring.cli.main import main; main()", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)


ASKED = ("--attacks", "ddn,fmn,surfree", "--data", "digits", "--limit", 100, "--budget", 60, "--out", "run")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    (folder / "net.py").write_text(NET)
    done = run("compare", "net.py:linear", *ASKED, "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def lines(path: Path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_json_has_the_figures(compared):
    _, said = compared
    assert [entry["name"] for entry in said["attacks"]] == ["ddn", "fmn", "surfree"]
    assert (said["threat"], said["norm"], said["budget"], said["rows"]) == ("l2, any distance", "l2", 60, 100)
    for entry in said["attacks"]:
        held = round(said["clean_accuracy"] * 100)
        assert (entry["forward"] + entry["backward"]) / held <= 60
        assert 0 <= entry["optimality"] <= 1
        assert entry["median"] == entry["median_l2"]
    assert max(said["attacks"], key=lambda e: e["optimality"])["name"] != "surfree"  # which sees labels only


def test_files_agree_with_the_figures(compared):
    folder, said = compared
    table = lines(folder / "run" / "attacks.csv")
    assert [line["name"] for line in table] == ["ddn", "fmn", "surfree"]
    assert float(table[0]["median"]) == pytest.approx(said["attacks"][0]["median"])
    rows = lines(folder / "run" / "rows.csv")
    assert len(rows) == 100
    for row in rows:
        found = [float(row[name]) for name in ("ddn", "fmn", "surfree") if row[name]]
        assert float(row["best"] or "inf") == min(found, default=float("inf"))
    wrong = sum(row["best"] == "0" for row in rows)
    assert wrong == round(100 * (1 - said["clean_accuracy"]))
    for name in ("security", "front"):
        drawn = ElementTree.parse(folder / "run" / f"{name}.svg").getroot()
        assert drawn.tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(--" not in (folder / "run" / f"{name}.svg").read_text()
    page = (folder / "run" / "report.html").read_text()
    assert "Nearest, and at what cost" in page
    assert "One image under each attack" in page


def test_a_run_cut_short_goes_on(compared):
    folder, said = compared
    stored = folder / "run" / "evidence" / "attack-01.safetensors"
    before = stored.read_bytes()
    stored.unlink()
    again = run("compare", "net.py:linear", *ASKED, "--json", cwd=folder)
    assert again.returncode == 0, again.stderr
    told = json.loads(again.stdout)
    for entry, other in zip(told["attacks"], said["attacks"], strict=True):
        assert {k: v for k, v in entry.items() if k != "seconds"} == {
            k: v for k, v in other.items() if k != "seconds"
        }
    assert told["attacks"][0]["seconds"] == said["attacks"][0]["seconds"]  # what was there was not done again
    assert len(stored.read_bytes()) == len(before)
    other = run("compare", "net.py:linear", *ASKED, "--seed", 1, cwd=folder)
    assert other.returncode == 2
    assert "seed" in other.stderr


def test_a_group_says_whom_it_leaves_out(compared):
    folder, _ = compared
    words = ("--attacks", "l1", "--data", "digits", "--limit", 5, "--budget", 20, "--out", "l1")
    done = run("compare", "net.py:linear", *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "needs a radius: --eps" in done.stdout
    assert {"ead", "fmn", "pdpgd"} <= {line["name"] for line in lines(folder / "l1" / "attacks.csv")}
    failed = run("compare", "net.py:linear", "--attacks", "l3", "--data", "digits", cwd=folder)
    assert failed.returncode == 2
    assert "l3" in failed.stderr
