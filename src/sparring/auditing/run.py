"""The run folder: what was asked, what was found, and the images that show it.

    <out>/plan.json                      what was asked for: every setting, seed, version
    <out>/evidence/<section>.json        the figures of one section, as measured
    <out>/evidence/<section>.safetensors its images and other tensors
    <out>/events.jsonl                   what happened when
    <out>/result.json, report.html       derived; rebuilt at will, never read as input

Each file appears whole or not at all: written beside its place, synced, renamed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from sparring.core.errors import IncompleteError, UsageError
from sparring.core.files import write_atomic
from sparring.core.plan import check_same

SCHEMA = 1
_KINDS = ("json", "safetensors", "csv", "html", "svg", "png")  # of the files that a run writes


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say what a failed write at `path` means for the run."""
    try:
        yield
    except OSError as error:
        raise IncompleteError(
            f"cannot write to {path}: {error.strerror or error}; what was written before is kept, and the same "
            f"command goes on from there once there is room"
        ) from error


def write_json(path: Path, value: object, *, indent: int | None = 2) -> None:
    """Write `value` as JSON, whole or not at all."""
    data = (json.dumps(value, indent=indent, allow_nan=False) + "\n").encode()
    with writing(path.parent):
        write_atomic(path, data)


class Run:
    """One run folder, open for reading and for adding sections."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, out: Path | None, slug: str, plan: Mapping[str, Any]) -> Run:
        """A run at `out`, or at `runs/<time>-<slug>` when `out` is None; `out` may hold a run of the same plan."""
        path = out or cls.place(slug)
        wanted = {"schema": SCHEMA, "kind": slug, **json.loads(json.dumps(plan))}
        if (path / "plan.json").is_file():
            found = json.loads((path / "plan.json").read_text())
            # Another machine may take a run up: what was asked for is the same.
            check_same(path, *({k: v for k, v in plan.items() if k != "hardware"} for plan in (wanted, found)))
        for folder in (path, path / "evidence", path / "evidence" / "rows", path / "work"):
            for stale in (file for kind in _KINDS for file in folder.glob(f".*.{kind}.????????")):
                stale.unlink(missing_ok=True)  # what a kill left half written
        write_json(path / "plan.json", wanted)
        run = cls(path)
        run.event("start", kind=slug)
        return run

    @staticmethod
    def place(slug: str) -> Path:
        """Where a run goes that nobody gave a place."""
        return Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{slug}"

    @classmethod
    def open(cls, path: Path) -> Run:
        """An existing run; `UsageError` when `path` is none."""
        if not (path / "plan.json").is_file():
            raise UsageError(f"expected a run folder with a plan.json, got {path}; name the folder a run made")
        return cls(path)

    @property
    def plan(self) -> dict[str, Any]:
        """What was asked for."""
        plan: dict[str, Any] = json.loads((self.path / "plan.json").read_text())
        return plan

    @property
    def sections(self) -> list[str]:
        """The names of the sections on disk."""
        return sorted(path.stem for path in (self.path / "evidence").glob("*.json"))

    def record(self, section: str, figures: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Store one section; its images first, so that figures never stand without them."""
        if tensors:
            self.keep(section, tensors)
        write_json(self.path / "evidence" / f"{section}.json", dict(figures))
        self.event("section", name=section)

    def keep(self, section: str, tensors: Mapping[str, Tensor]) -> None:
        """Store the tensors of a section whose figures are yet to come."""
        held = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        self.write(f"evidence/{section}.safetensors", save(held))

    def write(self, name: str, data: bytes) -> Path:
        """Write a file of the run, whole or not at all."""
        with writing(self.path):
            write_atomic(self.path / name, data)
        return self.path / name

    def figures(self, section: str) -> dict[str, Any] | None:
        """The figures of a section, or None if the run has no such section."""
        path = self.path / "evidence" / f"{section}.json"
        figures: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
        return figures

    def tensors(self, section: str) -> dict[str, Tensor]:
        """The tensors of a section; empty if it stored none."""
        path = self.path / "evidence" / f"{section}.safetensors"
        return load_file(path) if path.is_file() else {}

    def event(self, kind: str, /, **fields: object) -> None:
        """Append one line to `events.jsonl`."""
        line = json.dumps({"schema": SCHEMA, "time": round(time.time(), 3), "event": kind, **fields})
        with writing(self.path), (self.path / "events.jsonl").open("a") as file:
            file.write(line + "\n")

    def result(self) -> dict[str, Any]:
        """Every figure of the run in one dictionary: the plan, then a key for each section."""
        return {"schema": SCHEMA, "plan": self.plan} | {name: self.figures(name) for name in self.sections}

    def write_result(self) -> Path:
        """Rebuild `result.json` from the evidence."""
        write_json(self.path / "result.json", self.result())
        return self.path / "result.json"
