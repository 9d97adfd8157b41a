"""Downloads: several mirrors in turn, kept in memory until verified, then put in place whole."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparring.core.errors import DataError
from sparring.core.files import write_atomic

if TYPE_CHECKING:
    from rich.progress import Progress

TIMEOUT = (10, 30)  # seconds to connect, seconds between two pieces


class Bar:
    """A progress bar in the form pooch asks for, drawn by rich; counts bytes."""

    def __init__(self, progress: Progress, title: str) -> None:
        self.total = 0
        self.progress = progress
        self.task = progress.add_task(title, total=None)

    def update(self, count: int) -> None:
        """`count` more bytes have come."""
        self.progress.update(self.task, total=self.total, advance=count)

    def reset(self) -> None:
        """Back to no bytes."""
        self.progress.reset(self.task)

    def close(self) -> None:
        """Nothing to do: the progress display ends with its `with`."""


def download(url: str) -> bytes:
    """The bytes at `url`, with a progress bar if stderr is a terminal; an `OSError` when they do not come."""
    import pooch

    buffer = io.BytesIO()
    if not sys.stderr.isatty():
        pooch.HTTPDownloader(progressbar=False, timeout=TIMEOUT)(url, buffer, None)
        return buffer.getvalue()
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = Bar(progress, url.rsplit("/", 1)[-1])
        pooch.HTTPDownloader(progressbar=bar, timeout=TIMEOUT)(url, buffer, None)
    return buffer.getvalue()


def first_good(
    urls: Sequence[str], verify: Callable[[bytes, str], bytes], on_status: Callable[[str], None]
) -> tuple[bytes, bytes]:
    """What the first good one of `urls` sent, and what `verify(sent, url)` made of it; else `DataError`."""
    failures = []
    for url in urls:
        on_status(f"downloading {url}")
        try:
            sent = download(url)
            return sent, verify(sent, url)
        except (OSError, DataError) as error:
            failures.append(str(error) if isinstance(error, DataError) else f"{url}: {_root(error)}")
            on_status(f"failed: {failures[-1]}")
    raise DataError("no mirror sent it:\n  " + "\n  ".join(failures))


def _root(error: BaseException) -> str:
    """What first went wrong, in place of the three layers that wrap it."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error) or type(error).__name__


def keep(path: Path, data: bytes) -> None:
    """Put `data` at `path` whole or not at all; `DataError` when the folder cannot be written."""
    try:
        write_atomic(path, data)
    except OSError as error:
        raise DataError(f"cannot keep {path} ({error}); name a writable folder with $SPARRING_HOME") from error
