"""Crashes: a run that is killed, has no room, or finds a file damaged loses little and says nothing false."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
from torch import Tensor, nn

from sparring.auditing.audit import Audit, audit
from sparring.auditing.evidence import Evidence, Shard
from sparring.auditing.masking import Cost
from sparring.core.errors import DataError, IncompleteError
from sparring.core.threat import Linf
from sparring.core.verdict import Verdict

Rows = tuple[Tensor, Tensor]
Known = dict[int, tuple[str, bytes]]  # by id: the verdict, and the bytes of the image
LIMIT = Linf(0.09)

# One process that loads torch once, and audits in children that it forks, kills and measures.
WORKER = """
import json, os, random, signal, sys, time
import torch
from torch import nn
from sparring.auditing import masking
from sparring.auditing.audit import audit
from sparring.core.threat import Linf

torch.set_num_threads(1)
masking.check = lambda *args, **options: ([], masking.Cost(0, 0))
folder = sys.argv[1]

def work(out, rows, profile, eps, width=32):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10)).eval()
    x = torch.rand(rows, 1, 8, 8)
    audit(net, (x, net(x).argmax(1)), Linf(eps), profile=profile, width=width, out=f"{folder}/{out}", certify=False)

def start(*job, before=lambda: None):
    pid = os.fork()
    if not pid:
        before()
        work(*job)
        os._exit(0)
    return pid

def end(pid):
    _, status, usage = os.wait4(pid, 0)
    assert os.WIFSIGNALED(status) or status == 0, status
    return os.WIFSIGNALED(status), usage.ru_maxrss

def killed_at_any_time():
    job, dice, killed = (30, "standard", 0.02), random.Random(1), []
    began = time.monotonic()
    work("any/whole", *job)
    whole = time.monotonic() - began
    for _ in range(6):
        pid = start("any/cut", *job)
        time.sleep(whole * dice.uniform(0.02, 0.25))
        os.kill(pid, signal.SIGKILL)
        killed.append(end(pid)[0])
    assert not end(start("any/cut", *job))[0]
    return killed

def killed_at_every_write():
    # The first run at its first write, the second at its second, and so on until one comes through
    def dying_at(last):
        writes, sync = iter(range(last)), os.fsync
        def fsync(file):
            if next(writes) == last - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            sync(file)
        def before():
            os.fsync = fsync
        return before

    job, runs = (12, "quick", 0.02), 0
    work("write/whole", *job)
    while runs < 50 and end(start("write/cut", *job, before=dying_at(runs + 1)))[0]:
        runs += 1
    return runs

work("warm", 4, "quick", 0.02)
found = {"killed": killed_at_any_time(), "runs": killed_at_every_write()}
found["memory"] = [end(start(f"memory/{rows}", rows, "quick", 0.03, None))[1] for rows in (1000, 20_000)]
print(json.dumps(found))
"""


class Worked(NamedTuple):
    """What the worker found."""

    folder: Path
    killed: list[bool]  # of the runs that were to be killed at any time: was there still something to kill?
    runs: int  # that were killed at a write
    memory: list[int]  # KiB at most in a process that audits 1,000 images, and in one with 20,000


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> Worked:
    if not sys.platform.startswith("linux"):
        pytest.skip("forks, and reads memory in KiB")
    folder = tmp_path_factory.mktemp("worked")
    command = [sys.executable, "-c", WORKER, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return Worked(folder, **json.loads(done.stdout))


@pytest.fixture(autouse=True)
def no_checklist(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checklist has tests of its own, and takes half of the time of an audit as small as these."""
    monkeypatch.setattr("sparring.auditing.masking.check", lambda *args, **options: ([], Cost(0, 0)))


@pytest.fixture(scope="module")
def rows(digits: Rows, net: nn.Sequential) -> Rows:
    x, y = digits[0][1500:], digits[1][1500:]
    right = (net(x).argmax(1) == y).nonzero().squeeze(1)[:16]
    return x[right], y[right]


def quick(net: nn.Module, rows: Rows, out: Path, **options: int) -> Audit:
    return audit(net, rows, LIMIT, **({"profile": "quick", "width": 16, "certify": False} | options), out=out)


def known(run: Path) -> Known:
    """The verdict and the stored image of every row."""
    result = Audit(run, {})
    images = result.witnesses()
    return {
        row: (str(verdict), images[row].numpy().tobytes() if row in images else b"")
        for row, verdict in result.verdicts().items()
    }


# Killed


def test_an_audit_that_is_killed_again_and_again_ends_as_one_that_is_not(worked):
    assert sum(worked.killed) >= 2  # on a busy machine the last ones may come too late
    whole = known(worked.folder / "any/whole")
    assert len(whole) == 30
    assert {verdict for verdict, _ in whole.values()} == {"broken", "undecided"}
    assert known(worked.folder / "any/cut") == whole


def test_an_audit_that_is_killed_at_every_write_ends_as_one_that_is_not(worked):
    """With a file written, and not yet in its place."""
    assert 4 <= worked.runs < 50
    runs = [worked.folder / "write" / run for run in ("cut", "whole")]
    assert known(runs[0]) == known(runs[1])
    files = [{path.name for path in run.glob("*") if not path.name.startswith(".")} for run in runs]
    assert {"rows.csv", "result.json", "plan.json"} <= files[0] & files[1]


def test_twenty_times_the_images_take_little_more_memory(worked):
    few, many = worked.memory
    assert many - few < 100 * 1024


def test_nothing_half_written_is_left_lying_about(net, rows, tmp_path):
    (tmp_path / "work").mkdir()
    left = [tmp_path / "work/.01-0000.safetensors.abcdefgh", tmp_path / ".plan.json.abcdefgh"]
    for path in left:
        path.write_bytes(b"half")
    assert quick(net, rows, tmp_path).complete
    assert not [path for path in left if path.exists()]
    assert not (tmp_path / "work").exists()


def test_files_of_others_are_left_alone(net, rows, tmp_path):
    """Such as where the run is to be in a folder that is in use: .env.template has the form of a temporary name."""
    (tmp_path / "notes/old").mkdir(parents=True)
    others = [tmp_path / name for name in (".env.template", "notes/.env.template", "notes/old/.zshrc.20250101")]
    for path in others:
        path.write_text("mine")
    quick(net, rows, tmp_path)
    assert all(path.exists() for path in others)


def crash(net: nn.Module, rows: Rows, out: Path, stage: int, *, committed: bool = False, width: int = 16) -> None:
    """An audit that dies when it commits a shard of `stage`, its images written: before, or after that."""
    commit = Evidence.commit

    def die(self: Evidence, name: str, shard: Shard) -> None:
        if committed or shard.stage < stage:
            commit(self, name, shard)
        if shard.stage == stage:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evidence, "commit", die)
        with pytest.raises(KeyboardInterrupt):
            quick(net, rows, out, width=width)


@pytest.mark.parametrize("width", [1, 5, 16])
def test_rows_whose_shard_was_not_committed_are_done_anew(width, net, rows, tmp_path):
    """Their images are there already, and the next attempt cuts the rows into other shards."""
    whole = quick(net, rows, tmp_path / "whole")
    crash(net, rows, tmp_path / "cut", 1)
    assert list((tmp_path / "cut/evidence/rows").glob("01-*.safetensors"))
    assert not list((tmp_path / "cut/evidence/rows").glob("01-*.json"))
    resumed = quick(net, rows, tmp_path / "cut", width=width)
    assert resumed.verdicts() == whole.verdicts()
    assert sorted(resumed.witnesses()) == sorted(whole.witnesses())
    if width == 16:
        assert known(tmp_path / "cut") == known(tmp_path / "whole")


def test_images_that_were_never_committed_are_nobodys(net, rows, tmp_path):
    holds = next(r for r, v in quick(net, rows, tmp_path / "whole").verdicts().items() if v is Verdict.UNDECIDED)
    rows = (rows[0].roll(-holds, 0), rows[1].roll(-holds, 0))
    crash(net, rows, tmp_path / "cut", 1)
    crash(net, rows, tmp_path / "cut", 1, committed=True, width=1)  # the first row alone
    result = Audit(tmp_path / "cut", {})
    assert sorted(result.witnesses()) == [row for row, v in result.verdicts().items() if v is Verdict.BROKEN]


# No room


@pytest.mark.parametrize(
    "file",
    [
        "00-0000.json",
        "01-0000.safetensors",
        "01-0000.json",
        "02-0000.json",
        *(f for f in ("plan.json", "checklist.json", "audit.json", "rows.csv", "result.json")),
    ],
)
def test_a_full_disk_ends_the_run_and_room_lets_it_go_on(file, net, rows, tmp_path, monkeypatch):
    whole = quick(net, rows, tmp_path / "whole")
    sync = os.fsync

    def full(handle: int) -> None:
        if f".{file}." in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(
            IncompleteError, match=r"cannot write to .*No space left on device.*the same command goes on"
        ):
            quick(net, rows, tmp_path / "cut")
    resumed = quick(net, rows, tmp_path / "cut")
    assert resumed.complete
    assert known(tmp_path / "cut") == known(tmp_path / "whole")
    assert resumed.counts == whole.counts


@pytest.mark.parametrize("new", [True, False], ids=["new", "begun"])
def test_a_read_only_folder_ends_the_run(new, net, rows, tmp_path, monkeypatch):
    """What `mkstemp` says there; root may write anywhere, so the folder cannot just be closed to it."""
    make = tempfile.mkstemp
    if not new:
        crash(net, rows, tmp_path, 2)

    def closed(*, dir: Path, prefix: str) -> tuple[int, str]:
        if not new and "plan.json" in prefix:
            return make(dir=dir, prefix=prefix)
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.mkstemp", closed)
    with pytest.raises(IncompleteError, match=r"cannot write to .*Read-only file system"):
        quick(net, rows, tmp_path)


# Damaged


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_damaged_shard_is_named_and_its_part_is_done_anew_when_it_is_removed(stage, net, rows, tmp_path):
    whole = known(quick(net, rows, tmp_path).run)
    path = tmp_path / f"evidence/rows/{stage:02d}-0000.json"
    text = path.read_text()
    dice = random.Random(stage)
    for cut in (0, 1, dice.randrange(2, len(text) - 2)):
        path.write_text(text[:cut])
        with pytest.raises(DataError, match=rf"{path.name}: damaged .*remove it"):
            quick(net, rows, tmp_path)
    shard = json.loads(text)
    path.write_text(json.dumps({key: shard[key] for key in shard if key != "ids"}))
    with pytest.raises(DataError, match=rf"{path.name}: damaged .*remove it"):
        quick(net, rows, tmp_path)
    path.write_text(text)
    assert known(quick(net, rows, tmp_path).run) == whole


def test_a_damaged_file_of_images_is_named(net, rows, tmp_path):
    result = quick(net, rows, tmp_path)
    path = tmp_path / "evidence/rows/01-0000.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"01-0000\.safetensors"):
        result.witnesses()


def test_a_missing_file_of_images_is_named(net, rows, tmp_path):
    result = quick(net, rows, tmp_path)
    (tmp_path / "evidence/rows/01-0000.safetensors").unlink()
    with pytest.raises(DataError, match=r"01-0000\.safetensors"):
        result.witnesses()


def test_a_damaged_file_of_closest_points_is_named(net, rows, tmp_path):
    crash(net, rows, tmp_path, 2)
    (path,) = (tmp_path / "work").glob("01-*.safetensors")
    for break_it in (lambda: path.write_bytes(path.read_bytes()[:-10]), path.unlink):
        break_it()
        with pytest.raises(DataError, match=rf"{path.name}: missing or damaged .*choose another --out"):
            quick(net, rows, tmp_path)
