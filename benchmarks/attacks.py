"""Gradient attacks, ours and the peers': the same rows, the same number of passes; how near, or how many fooled.

The attacks that look for the nearest image are in peers.py. With `--eps` those that search within a radius follow
(fixed.py): there an image counts if it lies no farther than eps. One judge for all, which sees only the images that
come back: inside the bounds, the label wrong, and the distance in float64. Passes are rows through the net, forward
and backward, counted by the same hooks for everybody.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import sparring  # before torch: see docs/decisions/003

# isort: split
import numpy as np
import torch
from torch import Tensor, nn

import fixed
import peers
from overhead import Counter
from sparring.core.threat import threat
from sparring.engine.process import keep_freed_memory
from victims import victim

_SLACK = 1e-6  # outside the bounds, or of a pixel: rounding
_ROUNDING = 1e-4  # of eps


def say(text: str) -> None:
    """A line for whoever waits."""
    print(text, file=sys.stderr, flush=True)


def judged(net: nn.Module, x: Tensor, y: Tensor, found: Tensor, norm: str) -> Tensor:
    """(n,) float64 distances of the images that came back; inf where one does not count."""
    delta = (found.detach().double() - x.double()).flatten(1)
    far = ((found < -_SLACK) | (found > 1 + _SLACK) | ~found.isfinite()).flatten(1).any(1)
    with torch.no_grad():
        wrong = net(found.detach().float().nan_to_num().clamp(0, 1)).argmax(1) != y
    length = {
        "linf": lambda: delta.abs().amax(1),
        "l2": lambda: delta.square().sum(1).sqrt(),
        "l1": lambda: delta.abs().sum(1),
        "l0": lambda: (delta.abs() > _SLACK).sum(1).double(),
        "ssim": lambda: threat("ssim", peers.INF).distance(found.float(), x),
        "unbounded": lambda: delta.square().sum(1).sqrt(),
    }[norm]()
    return torch.where(wrong & ~far, length, torch.inf)


def measure(
    entry: peers.Entry, net: nn.Module, x: Tensor, y: Tensor, norm: str, budget: int, eps: float
) -> dict[str, Any]:
    """One attack on all rows; within eps, with room for the rounding of a sum of float32."""
    counter = Counter(net).eval()
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  the peers draw from it
    began = time.perf_counter()
    try:
        found = entry.side(counter, x.clone(), y.clone(), max(int(budget // entry.cost), 1))
    except Exception as error:
        return {"family": entry.family, "who": entry.who, "failed": repr(error)[:200]}
    seconds, rows = time.perf_counter() - began, len(y)
    distance = judged(net, x, y, found, norm)
    distance = torch.where(distance <= eps * (1 + _ROUNDING) + _SLACK, distance, torch.inf)
    hit = distance.isfinite()
    return {
        "family": entry.family,
        "who": entry.who,
        "success": float(hit.double().mean()),
        "median": float(distance.median()),
        "mean": float(distance[hit].mean()) if hit.any() else float("inf"),
        "forward": counter.forward_rows / rows,
        "backward": counter.backward_rows / rows,
        "seconds": seconds,
        "distances": distance.tolist(),
    }


def markdown(title: str, results: list[dict[str, Any]]) -> str:
    """A table for people."""
    lines = [f"\n{title}\n", "| attack | whose | success | median | mean of found | F | B | seconds |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for r in results:
        if "failed" in r:
            lines.append(f"| `{r['family']}` | {r['who']} | {r['failed']} | | | | | |")
        else:
            lines.append(
                f"| `{r['family']}` | {r['who']} | {r['success']:.3f} | {r['median']:.4f} | {r['mean']:.4f} "
                f"| {r['forward']:.0f} | {r['backward']:.0f} | {r['seconds']:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Parse, train what is missing, measure, print."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", default="undefended,pgd", help="comma separated; see victims.py")
    parser.add_argument("--norms", default="l2,linf,l1,l0")
    parser.add_argument("--eps", default="", help="also within these: linf=0.1,l2=1.5,l1=8,l0=10,unbounded=inf")
    parser.add_argument("--only", default="", help="comma separated: these families or libraries only")
    parser.add_argument("--rows", type=int, default=200, help="images that the net gets right")
    parser.add_argument("--first", type=int, default=0, help="of them to leave out")
    parser.add_argument("--budget", type=int, default=200, help="passes a row, forward and backward together")
    parser.add_argument("--models", type=Path, default=Path("runs/victims"), help="where trained nets are kept")
    parser.add_argument("--data-dir", type=Path, default=None, help="before $SPARRING_DATA")
    parser.add_argument("--out", type=Path, default=None, help="a folder for one JSON file a net and norm")
    args = parser.parse_args()
    data_dir = args.data_dir or (Path(os.environ["SPARRING_DATA"]) if "SPARRING_DATA" in os.environ else None)
    radii = [(norm, float(value)) for norm, _, value in (pair.partition("=") for pair in args.eps.split(",") if pair)]
    only = set(args.only.split(",")) - {""}
    for name in args.nets.split(","):
        try:
            net, test = victim(name, args.models, data_dir, say)
        except sparring.SparringError as error:
            say(f"{name} is left out: {error}")
            continue
        with torch.no_grad():
            right = (net(test.x).argmax(1) == test.y).nonzero().squeeze(1)[args.first : args.first + args.rows]
        x, y = test.x[right].contiguous(), test.y[right]
        classes = net(x[:1]).shape[1]
        sections = [(norm, peers.INF, peers.entries(norm, classes)) for norm in args.norms.split(",") if norm]
        sections += [(norm, eps, fixed.entries(norm, classes, x[0].numel(), eps)) for norm, eps in radii]
        for norm, eps, chosen in sections:
            results = []
            for entry in chosen:
                if only and not only & {entry.family.split(":")[0], entry.who}:
                    continue
                with contextlib.redirect_stdout(sys.stderr):  # peers may talk
                    results.append(measure(entry, net, x, y, norm, args.budget, eps))
                say(markdown("", results[-1:]).splitlines()[-1])
            within = f" within {eps:g}" if eps < peers.INF else ""
            print(markdown(f"{name}, {norm}{within}, {len(y)} rows, {args.budget} passes", results), flush=True)
            if args.out:
                args.out.mkdir(parents=True, exist_ok=True)
                file = f"{name}-{norm}{within.replace(' ', '-')}-{args.budget}.json"
                (args.out / file).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
