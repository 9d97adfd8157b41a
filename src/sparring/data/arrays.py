"""Images in `.npz` files, with `x` and `y` in each: one file to be split, or `train.npz` and `test.npz`."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from sparring.core.errors import DataError
from sparring.data.images import Dataset, Images, Raw


def read(path: Path) -> Raw:
    """`x` and `y` of one `.npz` file, unchecked but for being there; pickles are refused."""
    if not path.is_file():
        raise DataError(f"{path}: expected an .npz file with x and y, got no file")
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise DataError(f"{path}: expected an .npz file with x and y, got a single array")
            missing = [key for key in ("x", "y") if key not in file]
            if missing:
                raise DataError(
                    f"{path}: expected arrays x and y, got {', '.join(file) or 'none'}; rename or add"
                )
            return Raw(str(path), file["x"], file["y"])
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path}: expected an .npz file of plain arrays, got {error}; save it again"
        ) from error


def load_file(path: Path) -> Dataset:
    """One file: its last fifth to test on, at least one row; a single row is both splits."""
    whole = Images.checked(path.stem, read(path))
    rows = torch.arange(len(whole))
    return Dataset.split(whole, rows >= len(rows) - max(1, len(rows) // 5))


def load_pair(folder: Path) -> Dataset:
    """A folder with `train.npz` and `test.npz`."""
    return Dataset.checked(folder.name, read(folder / "train.npz"), read(folder / "test.npz"))
