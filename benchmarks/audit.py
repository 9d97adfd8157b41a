"""The audit next to AutoAttack standard: the same nets, the same rows, one process.

For each net and threat model: robust accuracy of both, rows that only one of them broke, forward and backward
passes of each (rows that went through the net, counted by the same hooks), and wall time. The audit's time is
that of the verdicts and, beside it, that of the whole call with checklist, curve and evidence on disk.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sparring  # before torch: see docs/decisions/003

# isort: split
import torch
from torch import Tensor, nn

from overhead import Counter
from sparring.core.threat import threat
from sparring.engine.process import keep_freed_memory
from victims import victim

CASES = (
    ("undefended", "linf", 0.3),
    ("undefended", "linf", 0.1),
    ("fgsm", "linf", 0.3),
    ("fgsm", "linf", 0.1),
    ("pgd", "linf", 0.3),
    ("pgd", "linf", 0.1),
    ("trades", "linf", 0.3),
    ("trades", "linf", 0.1),
    ("undefended", "l2", 1.0),
    ("fgsm", "l2", 1.5),
    ("pgd", "l2", 2.0),
    ("digits", "linf", 0.2),
    ("cifar", "linf", 8 / 255),
)
THEIRS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


@dataclass(frozen=True)
class Side:
    """What one of the two reached, and what it spent on a row."""

    robust_accuracy: float
    forward: float
    backward: float
    seconds: float


def autoattack(net: nn.Module, x: Tensor, y: Tensor, norm: str, eps: float) -> tuple[Tensor, Side]:
    """AutoAttack standard, as its package runs it."""
    from pyautoattack.autoattack import AutoAttack

    counter = Counter(net).eval()
    peer = AutoAttack(counter, norm=THEIRS[norm], eps=eps, device="cpu", seed=0)
    began = time.perf_counter()
    adversarial, _ = peer.run_standard_evaluation(x, y, batch_size=500)
    seconds = time.perf_counter() - began
    with torch.no_grad():
        held = net(adversarial).argmax(1) == y
    rows = len(y)
    share = float(held.float().mean())
    return held, Side(share, counter.forward_rows / rows, counter.backward_rows / rows, seconds)


def audit(net: nn.Module, x: Tensor, y: Tensor, norm: str, eps: float, profile: str) -> tuple[Tensor, dict[str, Any]]:
    """Our audit, but for its proofs; passes are those that the verdicts cost, and beside them all that went in."""
    counter = Counter(net).eval()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        found = sparring.audit(
            counter, (x, y), threat(norm, eps), profile=profile, certify=False, out=Path(folder) / "run"
        )
        whole = time.perf_counter() - began
        verdicts = found.verdicts()
    figures, rows = found.figures, len(y)
    held = torch.tensor([verdicts[row] in ("undecided", "certified") for row in range(rows)])
    side = Side(
        figures["robust_accuracy"]["upper"],
        figures["forward_passes"] / rows,
        figures["backward_passes"] / rows,
        figures["seconds"],
    )
    through = {"forward": counter.forward_rows / rows, "backward": counter.backward_rows / rows, "seconds": whole}
    return held, {**asdict(side), "everything": through, "warnings": figures["warnings"]}


def warm_up(net: nn.Module, x: Tensor, y: Tensor) -> None:
    """Both on a few rows, so that neither pays for what is loaded once."""
    audit(net, x, y, "linf", 0.05, "quick")
    autoattack(net, x, y, "linf", 0.5)


def compare(net: nn.Module, x: Tensor, y: Tensor, norm: str, eps: float, profile: str) -> dict[str, Any]:
    """Both on the same rows."""
    ours_held, ours = audit(net, x, y, norm, eps, profile)
    theirs_held, peer = autoattack(net, x, y, norm, eps)
    theirs = asdict(peer)
    ratios = {key: theirs[key] / max(ours[key], 1e-9) for key in ("forward", "backward", "seconds")}
    return {
        "rows": len(y),
        "sparring": ours,
        "autoattack": theirs,
        "only_sparring_broke": int((theirs_held & ~ours_held).sum()),
        "only_autoattack_broke": int((~theirs_held & ours_held).sum()),
        "ratio": {**ratios, "seconds_everything": theirs["seconds"] / ours["everything"]["seconds"]},
    }


def show(results: list[dict[str, Any]]) -> None:
    """A table for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="robust accuracy in %, passes a row, and AutoAttack's cost over the audit's")
    heads = ("net", "threat", "rows", "audit", "AutoAttack", "only audit", "only AA", "F", "F AA", "B", "B AA")
    for head in (*heads, "F ratio", "B ratio", "time ratio", "(all)"):
        table.add_column(head, justify="left" if head in ("net", "threat") else "right")
    for r in results:
        ours, theirs, ratio = r["sparring"], r["autoattack"], r["ratio"]
        table.add_row(
            r["net"], f"{r['norm']} {r['eps']:.3g}", str(r["rows"]),
            f"{100 * ours['robust_accuracy']:.1f}", f"{100 * theirs['robust_accuracy']:.1f}",
            str(r["only_sparring_broke"]), str(r["only_autoattack_broke"]),
            f"{ours['forward']:,.0f}", f"{theirs['forward']:,.0f}", f"{ours['backward']:.1f}",
            f"{theirs['backward']:,.0f}", f"{ratio['forward']:.1f}", f"{ratio['backward']:.1f}",
            f"{ratio['seconds']:.1f}", f"{ratio['seconds_everything']:.1f}",
        )  # fmt: skip
    Console(width=150).print(table)


def main() -> None:
    """Parse, train what is missing, measure, print."""
    keep_freed_memory()  # for both alike
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--profile", default="standard")
    parser.add_argument("--nets", default="", help="comma separated; default: all")
    parser.add_argument("--norms", default="", help="comma separated; default: all")
    parser.add_argument("--models", type=Path, default=Path("runs/victims"), help="where trained nets are kept")
    parser.add_argument("--data-dir", type=Path, default=None, help="before $SPARRING_DATA")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else on stdout")
    args = parser.parse_args()
    data_dir = args.data_dir or (Path(os.environ["SPARRING_DATA"]) if "SPARRING_DATA" in os.environ else None)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    results = []
    with contextlib.redirect_stdout(sys.stderr):
        for name, norm, eps in CASES:
            if (args.nets and name not in args.nets.split(",")) or (args.norms and norm not in args.norms.split(",")):
                continue
            try:
                net, test = victim(name, args.models, data_dir, say)
            except sparring.SparringError as error:
                say(f"{name} is left out: {error}")
                continue
            rows = test.take(args.rows)
            if not results:
                warm_up(net, rows.x[:8], rows.y[:8])
            found = {"net": name, "norm": norm, "eps": eps, **compare(net, rows.x, rows.y, norm, eps, args.profile)}
            results.append(found)
            say(json.dumps(found))
    print(json.dumps({"results": results, "threads": torch.get_num_threads()}, indent=2)) if args.json else show(
        results
    )


if __name__ == "__main__":
    main()
