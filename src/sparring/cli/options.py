"""The options that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from sparring.core.errors import UsageError, unknown

Data = Annotated[str | None, typer.Option("--data", help="digits, mnist, fashion_mnist, an .npz file, or a folder.")]
DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Where data sets lie; before $SPARRING_DATA.")]
Seed = Annotated[int, typer.Option("--seed", help="The one seed that everything random comes from.")]
DeviceName = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Use the first N rows only.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder for the run [default: runs/<time>-<command>].")]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on standard output, logs on standard error.")
]
NORMS = "linf, l2, l1, l0 or unbounded"
Width = Annotated[int | None, typer.Option("--width", min=1, help="Rows a model call [default: automatic].")]
Norm = Annotated[str, typer.Option("--norm", help=f"{NORMS}.")]
Eps = Annotated[float | None, typer.Option("--eps", help="Radius, in the units of the input.")]


def device(name: str) -> str:
    """The device that `name` means here."""
    if name not in ("auto", "cpu", "cuda"):
        raise unknown("device", name, ("auto", "cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("expected a CUDA device, found none; use --device cpu")
    return "cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu"


def radius(norm: str, eps: float | None) -> float:
    """`eps`, which every norm but `unbounded` needs."""
    if norm == "unbounded":
        if eps is not None:
            raise UsageError(f"expected no --eps without a bound, got {eps}; name a --norm, or leave --eps out")
        return 0.0
    if eps is None:
        raise UsageError(f"expected --eps for norm {norm}; such as --eps 0.3 on MNIST")
    return eps
