"""Work that is taken up again must be the work that was begun."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparring.core.errors import UsageError


def check_same(path: Path, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """`UsageError` with what differs, unless the plan found at `path` is the one that is wanted."""
    different = [key for key in sorted({*wanted, *found}) if wanted.get(key) != found.get(key)]
    if different:
        first = different[0]
        raise UsageError(
            f"{path} was made with another {', '.join(different)} ({first}: {found.get(first)!r}, "
            f"now {wanted.get(first)!r}); choose another --out"
        )
