"""Data sets by name, or from files of your own.

A new named data set is one new file in this folder with a `Named` instance at its top.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

from sparring.core.errors import DataError, unknown
from sparring.data.arrays import load_file, load_pair
from sparring.data.folder import load_folder
from sparring.data.images import Dataset, Images
from sparring.data.named import Named, Request, silent

__all__ = ["Dataset", "Images", "available", "load", "names", "summaries"]


def load(
    spec: str,
    data_dir: Path | None = None,
    *,
    download: bool = True,
    on_status: Callable[[str], None] | None = None,
) -> Dataset:
    """The data set called `spec`, or the one in the `.npz` file or folder at `spec`."""
    known = _known()
    if spec in known:
        return known[spec].load(Request(data_dir, download, on_status or silent))
    path = _path(spec, known)
    if not path.exists():
        raise DataError(f"{path}: expected an .npz file or a folder of images, got nothing there")
    if path.is_file():
        return load_file(path)
    pair = any((path / name).exists() for name in ("train.npz", "test.npz"))
    return load_pair(path) if pair else load_folder(path)


def available(spec: str, data_dir: Path | None = None) -> bool:
    """Whether `spec` loads without a download; cheap, so contents are not verified."""
    known = _known()
    return known[spec].available(data_dir) if spec in known else _path(spec, known).exists()


def names() -> list[str]:
    """The names `load` knows, sorted."""
    return sorted(_known())


def summaries() -> dict[str, str]:
    """One line about each named data set, sorted by name."""
    return {name: named.summary for name, named in sorted(_known().items())}


def _known() -> dict[str, Named]:
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    found = [value for module in modules for value in vars(module).values() if isinstance(value, Named)]
    return {named.name: named for named in found}


def _path(spec: str, known: dict[str, Named]) -> Path:
    path = Path(spec).expanduser()
    bare = not path.suffix and len(path.parts) < 2
    if not spec or (bare and not path.exists()):
        raise unknown("data set", spec, known)
    return path.resolve()
