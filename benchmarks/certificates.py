"""What bounds cost and prove: each method on the same rows, as a multiple of the net's own forward passes.

For each net and eps: the share of rows proved, the mean lower bound of their weakest margin (higher is tighter), time
a row, and that time over a forward pass of the same rows, which are timed turn by turn in one run. Where auto_LiRPA
is installed (it needs an older torch than sparring's), its CROWN stands beside ours.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sparring  # before torch: see docs/decisions/003

# isort: split
import torch
from torch import Tensor, nn

from sparring.certificates.bounds import bounds
from sparring.certificates.graph import trace
from sparring.core.threat import Linf, Threat
from victims import victim

METHODS = ("ibp", "crown-ibp", "crown", "alpha-crown")
CASES = (("pgd", 0.1), ("pgd", 0.3), ("cifar", 2 / 255))


def theirs(net: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor | None:
    """(n,) the weakest margin's lower bound by auto_LiRPA's CROWN; None where it is not installed."""
    try:
        from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm
    except Exception:  # it breaks on import with a torch that it does not know
        return None
    ball = PerturbationLpNorm(norm=float("inf"), x_L=(x - threat.eps).clamp(0, 1), x_U=(x + threat.eps).clamp(0, 1))
    classes = int(net(x[:1]).shape[1])
    eye = torch.eye(classes)
    asked = torch.stack([(eye[label] - eye)[torch.arange(classes) != label] for label in y.tolist()])
    bounded = BoundedModule(net, x[:1], device="cpu")
    low, _ = bounded.compute_bounds(x=(BoundedTensor(x, ball),), C=asked, method="CROWN", bound_upper=False)
    found: Tensor = low.detach().amin(1)
    return found


def timed(call: Callable[[], object], rounds: int) -> float:
    """The median of the seconds of `rounds` calls."""
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def case(net: nn.Module, x: Tensor, y: Tensor, eps: float, methods: list[str], rounds: int) -> list[dict[str, Any]]:
    """A line for each method on images `x` (n, c, h, w) that `net` reads right."""
    model, threat = sparring.wrap(net), Linf(eps)
    traced = trace(model, x.shape[1:])
    with torch.no_grad():
        forward = timed(lambda: net(x), max(rounds, 5))
    lines: list[dict[str, Any]] = []

    def line(method: str, margin: Tensor, certified: float, seconds: float) -> None:
        lines.append({
            "method": method, "certified": certified, "mean_margin": margin.double().mean().item(),
            "seconds_per_row": seconds / len(x), "forward_passes": seconds / forward,
        })  # fmt: skip

    for method in methods:
        found = bounds(model, x, y, threat, method, traced=traced)
        margin = (found.lower - found.guard).amin(1)
        seconds = timed(lambda method=method: bounds(model, x, y, threat, method, traced=traced), rounds)  # type: ignore[misc]
        line(method, margin, found.certified.double().mean().item(), seconds)
    margin = theirs(net, x, y, threat)
    if margin is not None:
        line("auto_LiRPA crown", margin, (margin > 0).double().mean().item(),
             timed(lambda: theirs(net, x, y, threat), rounds))  # fmt: skip
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", default="", help="net=eps, comma-separated; all by default")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", type=Path, default=Path("runs/victims"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data_dir = Path(os.environ["SPARRING_DATA"]) if "SPARRING_DATA" in os.environ else None
    chosen = [one.split("=") for one in options.nets.split(",") if one]
    cases = [(name, float(eps)) for name, eps in chosen] or list(CASES)
    result = []
    print(f"{'net':<12}{'eps':>8}  {'method':<18}{'proved':>8}{'margin':>9}{'ms/row':>9}{'forward passes':>16}")
    for name, eps in cases:
        net, images = victim(name, options.models, data_dir, lambda said: print(said, file=sys.stderr))
        with torch.no_grad():
            right = (net(images.x[: 2 * options.rows]).argmax(1) == images.y[: 2 * options.rows]).nonzero().squeeze(1)
        rows = images.select(right[: options.rows])
        for line in case(net, rows.x, rows.y, eps, options.methods.split(","), options.rounds):
            result.append({"net": name, "eps": eps, "rows": len(rows), **line})
            print(f"{name:<12}{eps:>8.4g}  {line['method']:<18}{line['certified']:>8.1%}{line['mean_margin']:>9.2f}"
                  f"{1e3 * line['seconds_per_row']:>9.2f}{line['forward_passes']:>16.0f}", flush=True)  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
