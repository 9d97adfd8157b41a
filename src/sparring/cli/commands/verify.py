"""`sparring verify`: is there an input of an ONNX network that a VNN-LIB property forbids?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparring.certificates.properties import TIMEOUT, UNKNOWN
from sparring.cli import options, verified
from sparring.cli.show import Show
from sparring.core.errors import IncompleteError, UsageError
from sparring.core.files import write_atomic

_TIMEOUT = 60.0


def command(
    net: Annotated[Path | None, typer.Argument(help="A .onnx or .onnx.gz file.", show_default=False)] = None,
    prop: Annotated[
        Path | None, typer.Argument(metavar="PROPERTY", help="A .vnnlib or .vnnlib.gz file.", show_default=False)
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", help=f"Seconds [default: {_TIMEOUT:g}; with --csv those of each line]."),
    ] = None,
    list_: Annotated[
        Path | None, typer.Option("--csv", help="A list of onnx,vnnlib,seconds, with paths relative to it.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Where the answer goes too; with --csv all answers [default: results.csv]."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Say sat with a counterexample, unsat, unknown or timeout: exit code 0 for the first two, 3 for the others.

    With --csv, every line of a list; again with the same --out, those that are not answered there yet.
    """
    show = Show(json)
    if timeout is not None and not timeout > 0:
        raise UsageError(f"expected a positive --timeout, got {timeout:g}")
    if list_ is not None:
        if net is not None:
            raise UsageError("expected either a network with its property or --csv, got both")
        verified.run_list(show, list_, out or Path("results.csv"), timeout)
        return
    if net is None or prop is None:
        raise UsageError(
            "expected a network and a property, such as net.onnx property.vnnlib, or --csv instances.csv"
        )
    answer = verified.decide(net, prop, timeout or _TIMEOUT)
    text = verified.told(answer)
    if out is not None:
        write_atomic(out, text.encode())
    if not json:
        typer.echo(text, nl=False)
    show.result(verified.as_json(answer))
    if answer.verdict in (UNKNOWN, TIMEOUT):
        raise IncompleteError(f"{answer.verdict} after {answer.seconds:.1f} s; a longer --timeout may decide it")
