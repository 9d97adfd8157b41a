"""Images in `.npz` files, with `x` and `y` in each: one file to be split, or `train.npz` and `test.npz`."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from sparring.core.errors import DataError
from sparring.data.images import Dataset, Images, Raw

# What numpy and zipfile raise over damaged archives, as found by damaging some at random.
BROKEN = (OSError, ValueError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)


def read(path: Path) -> Raw:
    """`x` and `y` of one `.npz` file, unchecked but for being there; pickles are refused."""
    if not path.is_file():
        raise DataError(f"{path}: expected an .npz file with x and y, got no file")
    try:
        with path.open("rb") as handle:
            if not zipfile.is_zipfile(handle):
                raise DataError(f"{path}: expected an .npz file with x and y, got another kind or half of one")
            handle.seek(0)
            file = np.load(handle, allow_pickle=False)
            missing = [key for key in ("x", "y") if key not in file]
            if missing:
                raise DataError(f"{path}: expected arrays x and y, got {', '.join(file) or 'none'}; rename or add")
            return Raw(str(path), file["x"], file["y"])
    except BROKEN as error:
        raise DataError(f"{path}: expected an .npz file of plain arrays, got {error}; save it again") from error


def load_file(path: Path) -> Dataset:
    """One file: its last fifth to test on, at least one row; a single row is both splits."""
    whole = Images.checked(path.stem, read(path))
    rows = torch.arange(len(whole))
    return Dataset.split(whole, rows >= len(rows) - max(1, len(rows) // 5))


def load_pair(folder: Path) -> Dataset:
    """A folder with `train.npz` and `test.npz`."""
    return Dataset.checked(folder.name, read(folder / "train.npz"), read(folder / "test.npz"))
