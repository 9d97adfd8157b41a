"""What a person sees: status on standard error, results on standard output, progress on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text


def error_console() -> Console:
    """Standard error."""
    return Console(stderr=True)


class _Rate(ProgressColumn):
    """Steps or rows in a second."""

    def render(self, task: Task) -> Text:
        """Such as `312/s`."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s", style="progress.data.speed")


class Show:
    """Where a command's words go: with `json_only`, standard output is kept for one JSON document."""

    def __init__(self, json_only: bool) -> None:
        self.json_only = json_only
        self.err = error_console()
        self.out = self.err if json_only else Console(soft_wrap=True, width=None if sys.stdout.isatty() else 160)
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    @contextmanager
    def progress(self) -> Iterator[None]:
        """Show bars with rate and time left while this lasts, if standard error is a terminal."""
        if not sys.stderr.isatty():
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.err, transient=True) as self._progress:
            yield
        self._progress = None

    def tick(self, what: str, done: int, of: int) -> None:
        """Move the bar called `what`; the bars of what is over go away."""
        if self._progress is None:
            return
        if what not in self._tasks:
            for task in self._tasks.values():
                self._progress.remove_task(task)
            self._tasks = {what: self._progress.add_task(what, total=of)}
        self._progress.update(self._tasks[what], completed=done, total=of)

    def say(self, text: str) -> None:
        """A line of what is going on, above the bars."""
        above = self._progress is not None and (self.json_only or self.out.is_terminal)
        console = self.err if above else self.out  # rich lifts the bars only for its own console
        console.print(text, highlight=False, markup=False)

    def result(self, value: dict[str, Any]) -> None:
        """The JSON document, if it was asked for."""
        if self.json_only:
            typer.echo(json.dumps(value, allow_nan=False))

    def table(self, title: str, head: list[str], rows: list[list[str]], *, words: bool = False) -> None:
        """A table of results; the first column is text, the others are figures, or `words`."""
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        for i, name in enumerate(head):
            table.add_column(name, justify="left" if i == 0 or words else "right", no_wrap=i == 0, overflow="fold")
        for row in rows:
            table.add_row(*row)
        self.out.print(table)
