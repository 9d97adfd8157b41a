"""`sparring report`: rebuild what is derived from a run's evidence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparring.auditing.audit import conclude
from sparring.auditing.run import Run
from sparring.cli import options
from sparring.cli.show import Show
from sparring.reporting import write_report


def command(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    json: options.Json = False,
) -> None:
    """Write result.json and report.html of RUN anew."""
    show, opened = Show(json), Run.open(run)
    if opened.plan.get("kind") == "audit":
        conclude(opened)
    result, report = opened.write_result(), write_report(opened)
    show.say(f"report: {report}")
    show.result({"report": str(report), "result": str(result), "run": str(run)})
