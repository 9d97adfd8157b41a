"""`sparring verify` from words to the competition's format, its exit codes, and the results of a list."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

from sparring.certificates.properties import Answer  # noqa: E402
from sparring.cli import verified  # noqa: E402
from sparring.cli.main import main  # noqa: E402

BOX = "".join(f"(declare-const {name} Real)\n" for name in ("X_0", "X_1", "X_2", "Y_0", "Y_1"))
BOX += "".join(f"(assert (<= X_{i} 1))\n(assert (>= X_{i} -0.5))\n" for i in range(3))


def run(*words):
    """The exit code of `sparring verify` with these words, and what it wrote to standard output and error."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["sparring", "verify", *map(str, words)])
        try:
            main()
        except SystemExit as end:
            return end.code or 0, out.getvalue(), err.getvalue()
    return 0, out.getvalue(), err.getvalue()


@pytest.fixture
def bench(tmp_path):
    """A benchmark: y = (relu(x_0 + x_1), relu(x_2) - 1), as files beside a list, packed and not."""
    make = onnx.helper
    held = [np.array([[1, 0], [1, 0], [0, 1]], np.float32), np.array([0, -1], np.float32)]
    graph = make.make_graph(
        [make.make_node(*node) for node in (("MatMul", "xw", "m"), ("Relu", "m", "r"), ("Add", "rb", "y"))],
        "g",
        [make.make_tensor_value_info("x", 1, [1, 3])],
        [make.make_tensor_value_info("y", 1, [1, 2])],
        [onnx.numpy_helper.from_array(array, name) for array, name in zip(held, "wb", strict=True)],
    )
    stored = make.make_model(graph, opset_imports=[make.make_opsetid("", 13)], ir_version=8).SerializeToString()
    for folder in ("onnx", "vnnlib"):
        (tmp_path / folder).mkdir()
    (tmp_path / "onnx/net.onnx").write_bytes(stored)
    (tmp_path / "onnx/packed.onnx.gz").write_bytes(gzip.compress(stored))
    (tmp_path / "vnnlib/sat.vnnlib").write_text(BOX + "(assert (or (>= Y_0 3) (and (>= Y_0 1.9) (<= Y_1 -0.75))))")
    (tmp_path / "vnnlib/unsat.vnnlib").write_text(BOX + "(assert (or (>= Y_0 2.01) (>= Y_1 0.01)))")
    (tmp_path / "vnnlib/packed.vnnlib.gz").write_bytes(gzip.compress((BOX + "(assert (<= Y_1 -1.01))").encode()))
    (tmp_path / "vnnlib/bad.vnnlib").write_text(BOX + "(assert (not (<= Y_0 1)))")
    return tmp_path


def test_a_counterexample_in_the_competitions_format(bench):
    code, out, _ = run(bench / "onnx/net.onnx", bench / "vnnlib/sat.vnnlib", "--out", bench / "answer.txt")
    assert code == 0
    assert (bench / "answer.txt").read_text() == out
    first, rest = out.split("\n", 1)
    assert first == "sat"
    number = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
    assert re.fullmatch(rf"\((\([XY]_\d {number}\)\n){{4}}\(Y_1 {number}\)\)\n", rest)
    pairs = re.findall(rf"\((\w+) ({number})\)", rest)
    assert [name for name, _ in pairs] == ["X_0", "X_1", "X_2", "Y_0", "Y_1"]
    x0, x1, x2, y0, y1 = (float(value) for _, value in pairs)
    assert all(-0.5 <= x <= 1 for x in (x0, x1, x2))
    assert max(x0 + x1, 0) == pytest.approx(y0, abs=1e-6)
    assert max(x2, 0) - 1 == pytest.approx(y1, abs=1e-6)
    assert y0 >= 1.9
    assert y1 <= -0.75


def test_unsat_is_one_word(bench):
    assert run(bench / "onnx/net.onnx", bench / "vnnlib/unsat.vnnlib")[:2] == (0, "unsat\n")
    assert run(bench / "onnx/packed.onnx.gz", bench / "vnnlib/packed.vnnlib.gz")[:2] == (0, "unsat\n")


def test_json(bench):
    code, out, _ = run(bench / "onnx/net.onnx", bench / "vnnlib/sat.vnnlib", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["verdict"] == "sat"
    assert len(found["counterexample"]["x"]) == 3
    assert found["counterexample"]["y"][0] >= 1.9
    assert set(json.loads(run(bench / "onnx/net.onnx", bench / "vnnlib/unsat.vnnlib", "--json")[1])) == {
        "verdict", "seconds", "by", "nodes"
    }  # fmt: skip


@pytest.mark.parametrize("verdict", ["unknown", "timeout"])
def test_what_is_undecided_ends_with_three(verdict, bench, monkeypatch):
    monkeypatch.setattr(verified, "verify", lambda *_, **__: Answer(verdict, "", 0.0))
    code, out, err = run(bench / "onnx/net.onnx", bench / "vnnlib/sat.vnnlib")
    assert (code, out) == (3, f"{verdict}\n")
    assert "--timeout" in err


def test_the_time_limit_is_that_of_the_command_or_of_the_line(bench, monkeypatch):
    given = []
    monkeypatch.setattr(verified, "verify", lambda *_, timeout: given.append(timeout) or Answer("unsat", "", 0.0))
    pair = (bench / "onnx/net.onnx", bench / "vnnlib/unsat.vnnlib")
    run(*pair)
    run(*pair, "--timeout", 7)
    (bench / "list.csv").write_text("onnx/net.onnx,vnnlib/unsat.vnnlib,20\nonnx/net.onnx, vnnlib/sat.vnnlib, 5.5\n")
    run("--csv", bench / "list.csv", "--out", bench / "a.csv")
    run("--csv", bench / "list.csv", "--out", bench / "b.csv", "--timeout", 10)
    assert all(wanted - 5 < came <= wanted for came, wanted in zip(given, (60, 7, 20, 5.5, 10, 5.5), strict=True))


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["onnx/net.onnx", "vnnlib/bad.vnnlib"], 2, r"bad.vnnlib, line 12: expected and, or"),
        (["onnx/none.onnx", "vnnlib/sat.vnnlib"], 2, "found no file"),
        (["onnx/net.onnx", "vnnlib/none.vnnlib"], 2, "could not read"),
        (["vnnlib/sat.vnnlib", "vnnlib/sat.vnnlib"], 4, "expected an ONNX model"),
        (["onnx/net.onnx"], 2, "expected a network and a property"),
        ([], 2, "expected a network and a property"),
        (
            ["onnx/net.onnx", "vnnlib/sat.vnnlib", "--csv", "list.csv"],
            2,
            "either a network with its property or --csv",
        ),
        (["onnx/net.onnx", "vnnlib/sat.vnnlib", "--timeout", "0"], 2, "positive --timeout"),
        (["--csv", "none.csv"], 2, "none.csv"),
    ],
)
def test_bad_input(words, code, message, bench, monkeypatch):
    monkeypatch.chdir(bench)
    came, out, err = run(*words)
    assert (came, out) == (code, "")
    assert re.search(message, " ".join(err.split()))


LIST = """onnx/net.onnx,vnnlib/sat.vnnlib,20
./onnx/net.onnx,./vnnlib/unsat.vnnlib,20

onnx/packed.onnx,vnnlib/packed.vnnlib,20
onnx/net.onnx,vnnlib/bad.vnnlib,20
onnx/net.onnx,vnnlib/sat.vnnlib,20
"""


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_list_and_what_fails_in_it(bench):
    (bench / "instances.csv").write_text(LIST)
    code, out, err = run("--csv", bench / "instances.csv", "--out", bench / "results.csv")
    found = rows(bench / "results.csv")
    assert [row["verdict"] for row in found] == ["sat", "unsat", "unsat", "error", "sat"]
    assert [row["onnx"] for row in found][:3] == ["onnx/net.onnx", "./onnx/net.onnx", "onnx/packed.onnx"]
    assert all(0 <= float(row["seconds"]) < 20 for row in found)
    assert "bad.vnnlib, line 12: expected and, or" in " ".join(out.split())
    assert "2 sat, 2 unsat, 1 error" in out
    assert code == 4
    assert "1 of 5 instances failed" in " ".join(err.split())
    kept = {path.name: path.read_text() for path in (bench / "results.counterexamples").iterdir()}
    assert set(kept) == {"1-net-sat.txt", "5-net-sat.txt"}
    assert all(text.startswith("sat\n((X_0 ") for text in kept.values())


def test_a_list_is_gone_on_with_after_a_crash(bench, monkeypatch):
    (bench / "instances.csv").write_text(LIST)
    asked = []

    def crash(onnx_path, vnnlib_path, timeout):
        asked.append(vnnlib_path.name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return Answer("unsat" if "unsat" in vnnlib_path.name else "unknown", "", 1.25)

    monkeypatch.setattr(verified, "decide", crash)
    words = ("--csv", bench / "instances.csv", "--out", bench / "results.csv")
    assert run(*words)[0] == 130
    assert [row["verdict"] for row in rows(bench / "results.csv")] == ["unknown", "unsat"]
    assert run(*words)[0] == 3
    assert asked == ["sat.vnnlib", "unsat.vnnlib", "packed.vnnlib.gz"] * 1 + [
        "packed.vnnlib.gz", "bad.vnnlib", "sat.vnnlib"
    ]  # fmt: skip
    assert [row["vnnlib"] for row in rows(bench / "results.csv")] == [
        line.split(",")[1] for line in LIST.split("\n") if line
    ]
    before = (bench / "results.csv").read_bytes()
    code, out, _ = run(*words, "--json")
    assert code == 3
    assert len(asked) == 6
    assert json.loads(out)["counts"] == {"unknown": 4, "unsat": 1}
    assert (bench / "results.csv").read_bytes() == before


@pytest.mark.parametrize("text", ["", "\n", "a.onnx,b.vnnlib,soon\n", "a.onnx\n", "a,b,c,d\n", "a,b,-1\n", "a,b\n"])
def test_lists_that_are_none(text, bench):
    (bench / "list.csv").write_text(text)
    code, _, err = run("--csv", bench / "list.csv", "--out", bench / "results.csv")
    assert code == 2
    assert "expected lines onnx,vnnlib,seconds" in " ".join(err.split()) or "line 1: expected onnx" in err
    assert not (bench / "results.csv").exists()


def test_results_that_are_none_are_left_alone(bench):
    (bench / "instances.csv").write_text(LIST)
    (bench / "results.csv").write_text("my own notes\n")
    code, _, err = run("--csv", bench / "instances.csv", "--out", bench / "results.csv")
    assert code == 2
    assert "give another --out" in " ".join(err.split())
    assert (bench / "results.csv").read_text() == "my own notes\n"


def test_a_missing_package_is_named_with_its_install_line(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, _, err = run(bench / "onnx/net.onnx", bench / "vnnlib/sat.vnnlib")
    assert code == 2
    assert "pip install 'sparring[onnx]'" in " ".join(err.split())


def test_numbers_are_written_so_that_they_are_read_back_exactly():
    point = torch.tensor([0.1, 1e-7, -2.0 / 3.0], dtype=torch.float64)
    text = verified.told(Answer("sat", "", 0.0, 0, point, torch.tensor([1.5], dtype=torch.float64)))
    assert [float(word) for word in re.findall(r" ([^)]+)\)", text)] == [*point.tolist(), 1.5]
