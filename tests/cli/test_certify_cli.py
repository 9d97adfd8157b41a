"""`sparring certify` and the proofs of `sparring audit`, as a person or a CI job runs them."""

import csv
import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import pytest

from sparring.cli.main import main


def run(*words):
    """The program in this process: what it printed, and the code it ended with."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["sparring", *map(str, words)])
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("certify")
    done = run("train", "--data", "digits", "--net", "dense", "--steps", "200", "--out", path / "net")
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def certified(folder):
    words = ("--eps", "0.03", "--limit", "40", "--method", "crown", "--radius", "--json", "--out", folder / "c")
    done = run("certify", folder / "net", *words)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_json_document_and_the_run_folder(certified, folder):
    counts = certified["counts"]
    assert sum(counts.values()) == certified["rows"] == 40
    assert 0 < certified["certified_accuracy"] == counts["certified"] / 40 < 1
    assert certified["certified_accuracy"] <= certified["empirical"]["robust_accuracy"] <= certified["clean_accuracy"]
    assert certified["complete"]
    with (folder / "c" / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"id", "label", "method", "bound", "guard", "radius"} <= rows[0].keys()
    assert len(rows) == 40
    for row in rows:
        if row["verdict"] == "certified":
            assert row["method"] == "crown"
            assert float(row["bound"]) > 0
            assert float(row["radius"]) >= 0.03
    page = (folder / "c" / "report.html").read_text()
    assert "What is proved" in page
    assert "unknown" in page
    assert "How far the proofs reach towards the attacks" in page


def test_the_proofs_of_a_run_are_made_again_and_a_forged_one_fails(certified, folder):
    fine = run("certify", "--recheck", folder / "c", "--json")
    assert fine.returncode == 0, fine.stderr
    told = json.loads(fine.stdout)
    assert told["hold"] == told["proofs"] >= certified["counts"]["certified"]
    shards = sorted((folder / "c" / "evidence" / "rows").glob("01-*.json"))
    shard, text = next((path, text) for path in shards if '"held"' in (text := path.read_text()))
    shard.write_text(text.replace('"held"', '"certified"', 1))
    try:
        forged = run("certify", "--recheck", folder / "c")
    finally:
        shard.write_text(text)
    assert forged.returncode == 1
    assert f"{told['proofs']} of {told['proofs'] + 1} proofs hold" in forged.stdout
    assert "do not hold" in forged.stderr


def test_an_audit_proves_what_it_can_and_need_not(folder):
    words = (folder / "net", "--eps", "0.03", "--limit", "40", "--profile", "standard")
    proved = run("audit", *words, "--json", "--out", folder / "a")
    assert proved.returncode == 0, proved.stderr
    told = json.loads(proved.stdout)
    assert told["robust_accuracy"]["lower"] == told["counts"]["certified"] / 40 > 0
    assert run("certify", "--recheck", folder / "a").returncode == 0
    without = run("audit", *words, "--no-certify", "--out", folder / "b")
    assert without.returncode == 0
    assert "the lower end is 0: no proof was tried" in without.stdout
    again = run("audit", *words, "--out", folder / "a")
    assert f"the lower end: {told['counts']['certified']} rows are proved robust" in again.stdout
    page = (folder / "a" / "report.html").read_text()
    assert 'href="#certified"' in page
    assert "Who proved what" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "expected a MODEL"),
        (("net", "--eps", "0.1", "--method", "corwn"), "did you mean 'crown'"),
        (("net", "--eps", "0.1", "--norm", "l1"), "linf or l2"),
        (("net", "--eps", "0.1", "--budget", "soon"), "such as 60s or 5m"),
        (("--recheck", "nowhere"), "expected a run folder"),
    ],
)
def test_what_cannot_be_meant(words, message, folder, tmp_path):
    words = [str(folder / word) if word == "net" else word for word in words]
    done = run("certify", *words, "--out", tmp_path / "r")
    assert done.returncode == 2
    assert message in done.stderr
