"""Where files are looked for, and where downloads are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache() -> Path:
    """The folder downloads are kept in: `$SPARRING_HOME`, or the user's cache."""
    import platformdirs

    home = os.environ.get("SPARRING_HOME")
    return Path(home).expanduser() if home else Path(platformdirs.user_cache_dir("sparring"))


def folders(name: str, data_dir: Path | None) -> list[Path]:
    """The folders to search for data set `name`, best first; its own subfolder before the folder itself."""
    shared = os.environ.get("SPARRING_DATA")
    given = [data_dir, Path(shared) if shared else None, cache()]
    bases = [base.expanduser() for base in given if base is not None]
    return [folder for base in bases for folder in (base / name, base)]


def offline() -> bool:
    """Whether `$SPARRING_OFFLINE` forbids downloads."""
    return os.environ.get("SPARRING_OFFLINE", "") not in ("", "0")
