"""What a data set with a name of its own must offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sparring.data.images import Dataset


def silent(message: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Request:
    """Where to look first, whether a download is allowed, and whom to tell what is happening."""

    data_dir: Path | None = None
    download: bool = True
    on_status: Callable[[str], None] = silent


@dataclass(frozen=True)
class Named(ABC):
    """A data set found by name: any instance at the top of a module of this folder."""

    name: str
    summary: str

    @abstractmethod
    def available(self, data_dir: Path | None) -> bool:
        """Whether it loads without a download; cheap, so contents are not verified."""

    @abstractmethod
    def load(self, request: Request) -> Dataset:
        """The data, or a `DataError` that says what to do."""
