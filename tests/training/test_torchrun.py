"""Processes that torchrun started train together, to the weights of one; the first alone prints and writes."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from torch.nn.utils import parameters_to_vector

import sparring
from sparring.attacks.pgd import PGD
from sparring.core.errors import UsageError
from sparring.core.threat import Linf
from sparring.data import load
from sparring.defenses.madry import Madry
from sparring.defenses.standard import Standard
from sparring.models.checkpoint import open_checkpoint
from sparring.training import crew
from sparring.training.crew import follows, launched, processes
from sparring.training.fit import Settings, fit
from sparring.training.holdback import HoldBack
from sparring.training.share import Share, check_shareable

SCRIPT = """
import os
from pathlib import Path
import sparring
from sparring.cli.main import main

folder = Path(__file__).parent
if os.environ["RANK"] == "1":  # as on another machine
    (folder / "elsewhere").mkdir()
    os.chdir(folder / "elsewhere")
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
digits = sparring.load("digits")
nets = [sparring.train("dense", digits, steps=2, seed=seed, path=path) for seed, path in
        ((1, None), (2, "kept"), (2, "kept"))]
digests = [net.card["weights_sha256"] for net in nets]
(folder / f"rank{os.environ['RANK']}").write_text(" ".join([*digests, str(nets[0].path)]))
"""
SETTINGS, EPS = Settings("conv", 12, batch_size=33, every=4), 0.1
MADRY, HELD = Madry(PGD(steps=2), Linf(EPS)), HoldBack(20, Linf(EPS), PGD(steps=10))
WORDS = f"train --recipe madry --attack pgd:steps=2 --eps {EPS} --steps 12 --batch-size 33 --every 4 --hold-back 20"


class Killed(Exception):
    pass


def test_two_processes_take_a_training_up_and_end_with_the_weights_of_one(tmp_path):
    def stop(step: int) -> None:
        if step == 6:
            raise Killed

    digits, out, script = load("digits"), tmp_path / "run", tmp_path / "script.py"
    one = fit(SETTINGS, digits, MADRY, tmp_path / "one", hold_back=HELD)
    with pytest.raises(Killed):
        fit(SETTINGS, digits, MADRY, out / "conv", hold_back=HELD, on_step=stop)
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    done = subprocess.run(
        [*map(str, command), *WORDS.split(), "--device", "cpu", "--out", "run"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    two = open_checkpoint(out / "conv.safetensors")
    ours, theirs = (parameters_to_vector(net.net.parameters()) for net in (two, one))
    assert float((ours - theirs).detach().abs().max()) < 5e-5  # of gradients that are not averaged: 1e-2
    assert (two.card["devices"], two.card["plan"]) == (2, one.card["plan"])
    assert [line.split(",")[0] for line in done.stdout.splitlines()[:3]] == ["Step: 4", "Step: 8", "Step: 12"]
    assert len(done.stdout.splitlines()) == 4  # and where the checkpoint is
    events = [json.loads(line)["event"] for line in (out / "events.jsonl").read_text().splitlines()]
    assert events == ["start", "section"]
    assert not list(out.glob("*.partial"))
    assert not list((tmp_path / "elsewhere").iterdir())
    told = (tmp_path / "rank0").read_text().split()
    assert told == (tmp_path / "rank1").read_text().split()  # the same result, stored or not, trained or found
    assert told[1] == told[2] == open_checkpoint(tmp_path / "kept.safetensors").card["weights_sha256"] != told[0]


def torchrun(monkeypatch: pytest.MonkeyPatch, **told: int | str) -> None:
    given = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 1, **told}
    for name, value in given.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(crew, "_meet", lambda *_: pytest.fail("a group that nobody else will join"))


def test_a_process_knows_its_place(monkeypatch):
    assert (launched(), follows(), processes(3)) == (None, False, (3, 3))
    torchrun(monkeypatch)
    assert (launched(), follows()) == (Share(0, 2, 0), False)
    assert processes(1) == processes(2) == (2, 2)
    torchrun(monkeypatch, RANK=5, WORLD_SIZE=6, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2)  # the third machine's second
    assert (launched(), follows(), processes(1)) == (Share(5, 6, 1), True, (6, 2))
    assert [share.device("cuda") for share in (Share(5, 6, 1), Share(1, 2), Share())] == ["cuda:1", "cuda:1", "cuda"]
    torchrun(monkeypatch, WORLD_SIZE=1)
    assert launched() is None
    torchrun(monkeypatch)
    monkeypatch.delenv("MASTER_PORT")  # what else may set a RANK
    assert launched() is None


@pytest.mark.parametrize("devices", [0, 3])
def test_another_number_of_devices_is_refused(devices, monkeypatch, tmp_path):
    torchrun(monkeypatch)
    with pytest.raises(UsageError, match=rf"torchrun started 2 processes, got {devices}; leave out --devices"):
        fit(Settings("dense", 2), load("digits"), Standard(), tmp_path / "a", devices=devices)


def test_the_cuda_devices_counted_are_those_of_this_machine(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    check_shareable(6, 2, 33, Standard(), "torch", "cuda")
    with pytest.raises(UsageError, match="expected 3 CUDA devices, found 2"):
        check_shareable(6, 3, 33, Standard(), "torch", "cuda")


def test_the_package_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sparring", "--version"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(Path(sparring.__file__).with_name("__main__.py")), run_name="__main__")
    assert (end.value.code, capsys.readouterr().out) == (0, f"sparring {sparring.__version__}\n")
