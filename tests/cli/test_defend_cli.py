"""`sparring defend` from words to the run folder, its table and its page."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stdout

import pytest

from sparring.auditing import audit, curve
from sparring.auditing.run import Run
from sparring.cli.main import main
from sparring.core.showing import percent
from sparring.defending import measure
from sparring.defending.row import KEYS
from sparring.reporting.panels import defenses as panel

MINE = """
from dataclasses import dataclass
from typing import ClassVar
from sparring.guards.guard import Transform

@dataclass(frozen=True)
class Mine(Transform):
    name: ClassVar[str] = "mine"
    differentiable: ClassVar[bool] = True
    randomised: ClassVar[bool] = False

    def transform(self, x):
        return (x * 3).round() / 3
"""
SHORT = ("--data", "digits", "--net", "dense", "--eps", "0.1", "--steps", "60", "--limit", "6", "--profile", "quick")


def run(*words):
    """The exit code of `sparring defend` with these words, and what it printed."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.setattr(sys, "argv", ["sparring", "defend", *map(str, words)])
        for owner, name, value in ((curve, "ROWS", 2), (audit, "CHECKED", 4), (measure, "QUERIES", 50)):
            patch.setattr(owner, name, value)
        try:
            main()
        except SystemExit as end:
            return end.code or 0, out.getvalue()
    return 0, out.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("defend")


@pytest.fixture(scope="module")
def told(folder):
    path = folder / "mine_on_the_line.py"
    path.write_text(MINE)
    words = (*SHORT, "--defenses", f"{path}:Mine,label_smoothing:smoothing=0.2", "--out", folder / "run")
    return words, *run(*words, "--json")


def test_json_is_one_document_of_rows(told, folder):
    _, code, out = told
    assert code == 0
    said = json.loads(out)
    assert {row["defense"] for row in said["defenses"]} == {
        "undefended",
        "bit_depth",
        "label_smoothing:smoothing=0.2",
        f"{folder / 'mine_on_the_line.py'}:Mine",
    }
    for row in said["defenses"]:
        assert list(row) == list(KEYS)
    mine = next(row for row in said["defenses"] if row["defense"].endswith("Mine"))
    assert any(sign.startswith("false_claim: mine claims differentiable = True") for sign in mine["signs"])
    assert mine["details"]["guard"] == "Mine()"


def test_again_it_goes_on_and_says_the_same(told):
    words, _, out = told
    code, again = run(*words, "--json")
    assert (code, json.loads(again)) == (0, json.loads(out))


def test_the_table_and_the_page_have_naive_beside_adaptive(told, folder):
    words, _, out = told
    code, text = run(*words)
    assert code == 0
    page = (folder / "run" / "report.html").read_text()
    for row in json.loads(out)["defenses"]:
        naive, adaptive = percent(row["naive"], 1), percent(row["adaptive"], 1)
        assert f"{naive} -> {adaptive}" in text
        assert f"{row['defense'].split('/')[-1]}: {row['finding']}. {row['details']['sentence']}" in text
        assert row["finding"] in page
    assert "sign: false_claim: mine claims" in text
    assert panel.render(Run.open(folder / "run")).count(" → ") == len(json.loads(out)["defenses"]) + 1


def test_a_run_without_defenses_has_no_such_panel(tmp_path):
    assert panel.render(Run.create(tmp_path / "r", "attack", {})) is None


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--defenses", "madri"), "did you mean 'madry'"),
        (("--profile", "deep"), "unknown profile"),
        (("--norm", "l0"), "linf, l2 and l1, not in l0"),
        (("--defenses", "jpeg+median"), "one guard and one recipe"),
        (("--defenses", "gone.py:Mine"), "no file gone.py"),
    ],
)
def test_usage_errors_end_with_2_before_anything_is_made(words, why, tmp_path, capsys):
    code, _ = run(*SHORT, *words, "--out", tmp_path / "r")
    assert code == 2
    assert why in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "r").exists()


def test_eps_is_needed(capsys):
    assert run("--data", "digits")[0] == 2
    assert "expected --eps for norm linf" in capsys.readouterr().err
