"""`sparring certify`: what can be proved of a model, and whether the proofs of a run hold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparring.auditing.certifying import Certification
from sparring.auditing.certifying import certify as run_certify
from sparring.auditing.provers import METHODS
from sparring.auditing.rechecking import recheck as run_recheck
from sparring.auditing.run import Run
from sparring.cli import options
from sparring.cli.show import Show
from sparring.core.errors import GateError, IncompleteError, UsageError
from sparring.core.showing import percent
from sparring.core.threat import threat
from sparring.data import load
from sparring.models.spec import Named
from sparring.reporting import write_report


def command(
    model: Annotated[
        str | None, typer.Argument(help="A checkpoint, a .onnx file, or file.py:function [--recheck: the run's].")
    ] = None,
    data: options.Data = None,
    norm: Annotated[str, typer.Option("--norm", help="linf or l2.")] = "linf",
    eps: options.Eps = None,
    method: Annotated[str, typer.Option("--method", help=f"{', '.join(METHODS)}.")] = "alpha-crown",
    radius: Annotated[
        bool, typer.Option("--radius", help="Also find the largest eps that is proved, row by row.")
    ] = False,
    budget: Annotated[str | None, typer.Option("--budget", help="Stop after this long, such as 60s or 5m.")] = None,
    recheck: Annotated[
        Path | None, typer.Option("--recheck", help="Make every proof of this run (audit or certify) again.")
    ] = None,
    width: options.Width = None,
    data_dir: options.DataDir = None,
    limit: options.Limit = None,
    seed: options.Seed = 0,
    device: options.DeviceName = "auto",
    out: options.Out = None,
    json: options.Json = False,
) -> None:
    """Prove images robust, and draw certified accuracy below what a quick attack leaves."""
    show, where = Show(json), options.device(device)
    if recheck is not None:
        _recheck(show, Run.open(recheck), model, data, data_dir, where)
        return
    if model is None:
        raise UsageError("expected a MODEL to prove something of, or --recheck with the folder of a run")
    seconds, victim = options.seconds(budget), options.victim(model, where, None)
    images = load(options.dataset(data, victim), data_dir, on_status=show.say).test
    limits = threat(norm, options.radius(norm, eps), victim.model.bounds)
    with show.progress():
        found = run_certify(
            victim.model,
            images,
            limits,
            out or Run.place("certify"),
            method=method,
            radius=radius,
            limit=limit,
            budget=seconds,
            width=width,
            seed=seed,
            device=where,
            name=victim.name,
            tell=show.tick,
        )
    report = write_report(Run.open(found.run))
    _tables(show, found)
    show.say(f"report: {report}")
    show.result(found.figures | {"report": str(report)})
    if not found.complete and budget is None:
        raise IncompleteError(f"not complete; the same command with --out {found.run} goes on")


def _tables(show: Show, found: Certification) -> None:
    figures = found.figures
    rows = figures["rows"]
    show.table(
        f"{rows} rows: clean accuracy {percent(figures['clean_accuracy'])}",
        ["method", "rows", "proved", "seconds"],
        [
            [one["method"], f"{one['rows']:,}", f"{one['certified']:,}", f"{one['seconds']:,.2f}"]
            for one in figures["proofs"]["methods"]
        ],
    )
    show.say(found.sentence)
    if far := figures["radius"]:
        show.say(f"largest eps proved, of {far['rows']:,} rows that are right: median {far['median']:.4g}")
    if not found.complete:
        show.say(f"not complete: the same command with --out {found.run} goes on")


def _recheck(show: Show, run: Run, model: str | None, data: str | None, data_dir: Path | None, device: str) -> None:
    """Make the proofs of `run` again; `GateError` when one does not hold."""
    plan: dict[str, Any] = run.plan
    victim: Named = options.victim(model or plan["model"], device, None)
    images = load(data or plan["data"].removesuffix("/test"), data_dir, on_status=show.say).test
    found = run_recheck(run, victim.model, images, device)
    show.say(f"{found.proofs - len(found.failed):,} of {found.proofs:,} proofs hold ({run.path})")
    for claim in found.failed[:10]:
        where = f"evidence/rows/{claim.shard}.json"
        show.say(f"row {claim.id}: {claim.method} does not prove it at eps {claim.eps:g} ({where})")
    show.result(found.figures | {"run": str(run.path)})
    if found.failed:
        raise GateError(f"{len(found.failed)} of {found.proofs} proofs of {run.path} do not hold")
