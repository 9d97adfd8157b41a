"""The options that commands share."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer

from sparring.auditing.run import Run
from sparring.cli.show import Show
from sparring.core.errors import UsageError, unknown
from sparring.models.http import Remote
from sparring.models.spec import Named, open_model

Data = Annotated[str | None, typer.Option("--data", help="digits, mnist, fashion_mnist, an .npz file, or a folder.")]
DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Where data sets lie; before $SPARRING_DATA.")]
Seed = Annotated[int, typer.Option("--seed", help="The one seed that everything random comes from.")]
DeviceName = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Framework = Annotated[str, typer.Option("--framework", help="Compute the nets in torch or tensorflow (Keras).")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Use the first N rows only.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder for the run [default: runs/<time>-<command>].")]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on standard output, logs on standard error.")
]
NORMS = "linf, l2, l1, l0, ssim or unbounded"
Width = Annotated[int | None, typer.Option("--width", min=1, help="Rows a model call [default: automatic].")]
Norm = Annotated[str, typer.Option("--norm", help=f"{NORMS}.")]
MaxQueries = Annotated[
    int | None,
    typer.Option("--max-queries", min=1, help="Send a served model at most N images this time, retries included."),
]
Budget = Annotated[
    int | None, typer.Option("--budget", min=2, help="Forward and backward passes that an attack may spend on a row.")
]
Eps = Annotated[float | None, typer.Option("--eps", help="Radius, in the units of the input.")]


def device(name: str) -> str:
    """The device that `name` means here."""
    if name not in ("auto", "cpu", "cuda"):
        raise unknown("device", name, ("auto", "cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("expected a CUDA device, found none; use --device cpu")
    return "cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu"


def victim(spec: str, device: str, max_queries: int | None) -> Named:
    """The model that `spec` means."""
    found = open_model(spec, device)
    if max_queries is not None:
        if not isinstance(found.model, Remote):
            raise UsageError(f"expected a served model for --max-queries, got {spec}, which runs here; leave it out")
        found.model.allow(max_queries)
    return found


def dataset(data: str | None, victim: Named) -> str:
    """What --data names, or else the data set that the model was trained on."""
    spec: str | None = data or victim.card.get("data")
    if spec is None:
        raise UsageError("expected --data: this model's card names no data set")
    return spec


def queries(victim: Named) -> int | None:
    """Images that a served model was sent, retries included."""
    return victim.model.queries if isinstance(victim.model, Remote) else None


@contextmanager
def counted(show: Show, victim: Named, folder: Path) -> Iterator[None]:
    """Say in the end, a bad one too, how many images a served model was sent; the run at `folder` keeps it."""
    try:
        yield
    finally:
        if isinstance(victim.model, Remote):
            victim.model.close()
            show.say(f"{victim.model.queries:,} images sent to {victim.name}, retries included")
            if (folder / "plan.json").is_file():
                Run(folder).event("queries", sent=victim.model.queries)


_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def seconds(budget: str | None) -> float | None:
    """A time such as 60s or 5m in seconds."""
    if budget is None:
        return None
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(s|m|min|h|)", budget.strip())
    if match is None:
        raise UsageError(f"expected --budget as seconds, minutes or hours, such as 60s or 5m, got {budget!r}")
    return float(match[1]) * _UNITS[match[2]]


def radius(norm: str, eps: float | None) -> float:
    """`eps`, which every norm but `unbounded` needs."""
    if norm == "unbounded":
        if eps is not None:
            raise UsageError(f"expected no --eps without a bound, got {eps}; name a --norm, or leave --eps out")
        return 0.0
    if eps is None:
        raise UsageError(f"expected --eps for norm {norm}; such as --eps 0.3 on MNIST")
    return eps
