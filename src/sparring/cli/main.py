"""`sparring`: what a person types, and the exit codes.

0 done, 1 a gate failed, 2 usage, 3 incomplete, 4 model or attack error, 130 interrupted.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys

import typer

import sparring
from sparring.cli import commands
from sparring.cli.show import error_console
from sparring.core.errors import SparringError, UsageError, unknown
from sparring.engine.process import keep_freed_memory

_HELP = "Train an image classifier, attack it, harden it, and say honestly how robust it now is."


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sparring {sparring.__version__}")
        raise typer.Exit


def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Typer's place for options of the program itself."""


def names() -> list[str]:
    """The commands there are."""
    return [info.name for info in pkgutil.iter_modules(commands.__path__)]


def build() -> typer.Typer:
    """The program with every command in `commands/`."""
    app = typer.Typer(help=_HELP, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=True)
    app.callback()(_root)
    for name in names():
        module = importlib.import_module(f"sparring.cli.commands.{name}")
        app.command(name)(module.command)
    return app


def main() -> None:
    """Run, and end with the exit code that fits."""
    keep_freed_memory()
    try:
        words = [word for word in sys.argv[1:] if not word.startswith("-")]
        if words and sys.argv[1] == words[0] and words[0] not in names():
            raise unknown("command", words[0], names())
        build()()
    except SparringError as error:
        error_console().print(f"[bold red]error:[/] {_plain(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except OSError as error:
        error_console().print(f"[bold red]error:[/] {_plain(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(UsageError.exit_code)
    except KeyboardInterrupt:
        error_console().print("interrupted")
        sys.exit(130)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
