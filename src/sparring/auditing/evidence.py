"""What an audit has found so far, a shard at a time: enough to believe it, and to go on after a crash.

    evidence/rows/<stage>-<part>.json         which rows, what came of each, what it cost; its presence counts
    evidence/rows/<stage>-<part>.safetensors  the adversarial images: exact, and as 8-bit files hold them
    work/<stage>-<part>.safetensors           where the rows that hold came closest; gone when the audit is over

Every file appears whole or not at all, the `.json` last: a crash costs at most the rows then seated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from sparring.auditing.run import Run, write_json, writing
from sparring.core.errors import DataError
from sparring.core.files import write_atomic

_SHARD = re.compile(r"(\d{2,})-(\d{4,})\.json")


@dataclass(frozen=True)
class Shard:
    """One stage's word on some rows; lists hold an entry a row."""

    stage: int
    name: str  # of what was tried
    ids: list[int]
    state: list[str]  # held, broken, misclassified, certified or error
    gap: list[float]  # the largest margin seen, negative while the row holds
    forward: list[int]
    backward: list[int]
    moved: list[int] = field(default_factory=list)  # ids: found, and not confirmed from what was stored
    errors: dict[str, str] = field(default_factory=dict)  # id: what the model did
    label: list[int] = field(default_factory=list)  # what the model says: of the clean image in stage 0,
    confidence: list[float | None] = field(default_factory=list)  # else of the image stored, else nothing
    distance: list[float | None] = field(default_factory=list)
    eight_bit: list[bool] = field(default_factory=list)  # does the image survive as an 8-bit file?
    truth: list[int] = field(default_factory=list)  # true labels, in stage 0
    seconds: float = 0.0
    complete: bool = True  # False: rows that a stop left unsettled; they only cost
    nearer: list[int] | None = None  # in a stage that looks for distances: ids of the rows whose image is stored
    bound: list[float] | None = None  # in a stage of proofs: of the weakest margin, less the guard
    guard: list[float] | None = None  # there: how much the model's own rounding can eat up
    radius: list[float] | None = None  # in a stage that looks for the largest: a radius at which each row is proved


class Evidence:
    """The shards of one run."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.folder, self.work = run.path / "evidence" / "rows", run.path / "work"

    def shards(self, stage: int | None = None) -> Iterator[tuple[str, Shard]]:
        """Every shard, or those of one stage, by stage and part, with its name."""
        pattern = "*.json" if stage is None else f"{stage:02d}-*.json"
        found = [path for path in self.folder.glob(pattern) if _SHARD.fullmatch(path.name)]
        for path in sorted(found, key=lambda path: [int(part) for part in path.stem.split("-")]):
            try:
                yield path.stem, Shard(**json.loads(path.read_text()))
            except (ValueError, TypeError) as error:
                raise DataError(
                    f"{path}: damaged ({error}); remove it, and the same command does its part anew"
                ) from error

    def fresh(self, stage: int) -> str:
        """The name of the next shard of `stage`."""
        parts = [
            int(match[2])
            for path in self.folder.glob(f"{stage:02d}-*.json")
            if (match := _SHARD.fullmatch(path.name))
        ]
        return f"{stage:02d}-{max(parts, default=-1) + 1:04d}"

    def store_images(self, name: str, images: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Store adversarial images, and read back what is now on disk."""
        path = self.folder / f"{name}.safetensors"
        self._write(path, save({key: value.detach().cpu().contiguous() for key, value in images.items()}))
        return load_file(path)

    def store_work(self, name: str, ids: Tensor, best: Tensor) -> None:
        """Store where rows came closest."""
        held = {"ids": ids.cpu().contiguous(), "best": best.detach().cpu().contiguous()}
        self._write(self.work / f"{name}.safetensors", save(held))

    def commit(self, name: str, shard: Shard) -> None:
        """Make a shard count."""
        if shard.stage and not shard.label:
            (self.folder / f"{name}.safetensors").unlink(missing_ok=True)  # of a try that a crash cut short
        told = {key: value for key, value in asdict(shard).items() if value is not None}
        write_json(self.folder / f"{name}.json", told, indent=None)

    def images(self, name: str) -> dict[str, Tensor]:
        """The images of a shard that broke rows."""
        path = self.folder / f"{name}.safetensors"
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path}: missing or damaged ({error}); choose another --out") from error

    def closest(self, name: str, places: Tensor) -> Tensor:
        """(m, c, h, w) the closest points at `places` (m,) of a work shard."""
        path = self.work / f"{name}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                best: Tensor = file.get_tensor("best")
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path}: missing or damaged ({error}); choose another --out") from error
        return best[places]

    def forget(self, names: set[str]) -> None:
        """Remove the work shards that nothing needs any more."""
        for name in names:
            (self.work / f"{name}.safetensors").unlink(missing_ok=True)
        if self.work.is_dir() and not any(self.work.iterdir()):
            self.work.rmdir()

    def _write(self, path: Path, data: bytes) -> None:
        with writing(path.parent):
            write_atomic(path, data)


def as_json(value: Any) -> float | None:
    """A float for JSON: NaN becomes None."""
    number = float(value)
    return None if number != number else number
