"""`sparring audit`: a verdict for every image, with its witness."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from sparring.auditing.audit import Audit
from sparring.auditing.audit import audit as run_audit
from sparring.auditing.gate import check_bar, check_baseline, check_finished
from sparring.auditing.run import Run
from sparring.cli import options
from sparring.cli.show import Show
from sparring.core.errors import IncompleteError, UsageError
from sparring.core.showing import percent
from sparring.core.threat import threat
from sparring.data import load
from sparring.reporting import write_report

_Profile = Annotated[str, typer.Option("--profile", help="quick (a commit hook), standard, or deep (keeps digging).")]
_Certify = Annotated[
    bool,
    typer.Option("--certify/--no-certify", help="Prove rows robust where that can be done (linf, l2; torch)."),
]


def command(
    model: Annotated[str, typer.Argument(help="A checkpoint, a .onnx or .keras file, a URL, or file.py:function.")],
    data: options.Data = None,
    norm: Annotated[str, typer.Option("--norm", help="linf, l2 or l1.")] = "linf",
    eps: options.Eps = None,
    profile: _Profile = "standard",
    budget: Annotated[str | None, typer.Option("--budget", help="Stop after this long, such as 60s or 5m.")] = None,
    eight_bit: Annotated[bool, typer.Option("--eight-bit", help="Count images that survive as 8-bit files.")] = False,
    distances: Annotated[bool, typer.Option("--distances", help="Also find each image's smallest change.")] = False,
    certify: _Certify = True,
    fail_under: Annotated[
        float | None, typer.Option("--fail-under", help="Exit 1 if robust accuracy (its upper end) is below this.")
    ] = None,
    baseline: Annotated[Path | None, typer.Option("--baseline", help="The run folder of an earlier audit.")] = None,
    max_drop: Annotated[
        float, typer.Option("--max-drop", help="Exit 1 if it lies this much below the baseline's.")
    ] = 0.0,
    width: options.Width = None,
    max_queries: options.MaxQueries = None,
    data_dir: options.DataDir = None,
    limit: options.Limit = None,
    seed: options.Seed = 0,
    device: options.DeviceName = "auto",
    out: options.Out = None,
    json: options.Json = False,
) -> None:
    """Give every test image a verdict; again with the same --out, go on where a run was cut short."""
    show, where = Show(json), options.device(device)
    seconds = options.seconds(budget)
    if fail_under is not None and not 0 <= fail_under <= 1:
        raise UsageError(f"expected --fail-under as a share from 0 to 1, got {fail_under}")
    victim = options.victim(model, where, max_queries)
    images = load(options.dataset(data, victim), data_dir, on_status=show.say).test.take(limit)
    limits = threat(norm, options.radius(norm, eps), victim.model.bounds)
    before = None if baseline is None else Run.open(baseline)
    folder = out or Run.place("audit")
    with _going_on(show, folder), options.counted(show, victim, folder), show.progress():
        found = run_audit(
            victim.model,
            images,
            limits,
            profile=profile,
            seed=seed,
            budget=seconds,
            eight_bit=eight_bit,
            distances=distances,
            certify=certify,
            width=width,
            device=where,
            out=folder,
            name=victim.name,
            tell=show.tick,
        )
    report = write_report(Run.open(found.run))
    _tables(show, found)
    show.say(f"report: {report}")
    show.result(found.figures | {"report": str(report), "queries": options.queries(victim)})
    check_bar(found.figures, fail_under)
    check_baseline(found.figures, Run.open(found.run), before, max_drop)
    check_finished(found.figures, budget is not None)


@contextmanager
def _going_on(show: Show, folder: Path) -> Iterator[None]:
    """Say how a run that could not be finished is taken up, since nobody may have named its folder."""
    try:
        yield
    except IncompleteError:
        show.say(f"not complete: the same command with --out {folder} goes on")
        raise


def _tables(show: Show, found: Audit) -> None:
    figures = found.figures
    rows = figures["rows"]
    show.table(
        f"{rows} rows: clean accuracy {percent(figures['clean_accuracy'])}",
        ["verdict", "rows", "share"],
        [[name, f"{count:,}", percent(count / rows)] for name, count in figures["counts"].items()],
    )
    show.table(
        "who decided",
        ["tried", "met", "broke", "proved", "forward/row", "backward/row", "seconds"],
        [
            [
                stage["name"],
                f"{stage['rows']:,}",
                f"{stage['broken']:,}",
                f"{stage['certified']:,}" if "certified" in stage else "",
                f"{stage['forward'] / rows:,.1f}",
                f"{stage['backward'] / rows:,.1f}",
                f"{stage['seconds']:,.2f}",
            ]
            for stage in figures["stages"]
        ],
    )
    show.say(found.sentence)
    if far := figures.get("distances"):
        half = "more than half hold at any" if far["median"] is None else f"half have fallen at {far['median']:.4g}"
        show.say(f"smallest distances: found for {far['found']:,} rows that were right; of all rows {half}")
    show.say(_proved(figures))
    _remarks(show, figures)


def _proved(figures: dict[str, Any]) -> str:
    """What stands behind the lower end."""
    if figures["counts"]["certified"]:
        spot = (figures.get("proofs") or {}).get("spot_checked")
        checked = f"; {spot:,} of them were attacked all the same, and held" if spot else ""
        return f"the lower end: {figures['counts']['certified']:,} rows are proved robust{checked}"
    proofs = figures.get("proofs")
    if proofs is None:
        return "the lower end is 0: no proof was tried"
    if proofs["why_not"]:
        return f"the lower end is 0: {proofs['why_not']}"
    tried = ", ".join(f"{one['method']} on {one['rows']:,} rows" for one in proofs["methods"])
    return (
        f"the lower end is 0: nothing was proved (tried: {tried})"
        if tried
        else "the lower end is 0: no proof seemed within reach"
    )


def _remarks(show: Show, figures: dict[str, Any]) -> None:
    if figures["moved"]:
        show.say(
            f"{figures['moved']} rows were found broken once and, judged again, were not: rounding, or other "
            f"draws of a random model, decide there"
        )
    for row, reason in figures["errors"].items():
        show.say(f"row {row} has no verdict: {reason}")
    for warning in figures["warnings"]:
        show.say(f"warning: {warning}")
    if not figures["complete"]:
        show.say(f"not complete: the same command with --out {figures['run']} goes on")
