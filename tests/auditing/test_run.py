"""The run folder, and intervals."""

import json

import pytest
import torch
from scipy.stats import binom

from sparring.auditing.intervals import clopper_pearson
from sparring.auditing.run import Run
from sparring.core.errors import UsageError
from sparring.core.files import write_atomic


def test_sections_come_back_as_stored(tmp_path):
    run = Run.create(tmp_path / "r", "demo", {"seed": 3})
    x = torch.arange(6, dtype=torch.uint8).view(2, 3)
    run.record("a", {"n": 1.5, "none": None}, {"x": x, "view": x[:1]})
    again = Run.open(tmp_path / "r")
    assert again.figures("a") == {"n": 1.5, "none": None}
    assert torch.equal(again.tensors("a")["x"], x)
    assert torch.equal(again.tensors("a")["view"], x[:1])
    assert again.figures("b") is None
    assert again.tensors("b") == {}
    assert again.plan["seed"] == 3
    events = [json.loads(line) for line in (tmp_path / "r/events.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events] == ["start", "section"]


def test_nan_is_refused_where_json_has_no_word_for_it(tmp_path):
    run = Run.create(tmp_path / "r", "demo", {})
    with pytest.raises(ValueError, match="JSON"):
        run.record("a", {"n": float("nan")})
    assert run.sections == []


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_atomic(path, b"old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="expected a run folder"):
        Run.open(tmp_path)


@pytest.mark.parametrize(("hits", "rows"), [(0, 10), (10, 10), (3, 10), (70, 100), (1, 1)])
def test_clopper_pearson_is_exact(hits, rows):
    low, high = clopper_pearson(hits, rows)
    assert low <= hits / rows <= high
    if hits:
        assert binom.sf(hits - 1, rows, low) == pytest.approx(0.025, abs=1e-9)
    else:
        assert low == 0
    if hits < rows:
        assert binom.cdf(hits, rows, high) == pytest.approx(0.025, abs=1e-9)
    else:
        assert high == 1


def test_a_folder_takes_its_own_plan_again_and_no_other(tmp_path):
    Run.create(tmp_path / "r", "demo", {"seed": 3}).record("a", {"n": 1})
    assert Run.create(tmp_path / "r", "demo", {"seed": 3}).figures("a") == {"n": 1}
    with pytest.raises(UsageError, match=r"another seed \(seed: 3, now 4\)"):
        Run.create(tmp_path / "r", "demo", {"seed": 4})
    assert Run.open(tmp_path / "r").plan["seed"] == 3


def test_another_machine_may_take_a_run_up(tmp_path):
    Run.create(tmp_path / "r", "demo", {"seed": 3, "hardware": {"cores": 2}})
    assert Run.create(tmp_path / "r", "demo", {"seed": 3, "hardware": {"cores": 8}}).plan["hardware"] == {"cores": 8}
