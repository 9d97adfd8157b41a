"""What an attack costs above the bare model calls: sparring and its peers, side by side in one process.

(A) every seat full: no row ever succeeds, so each contender makes all of its calls, and all that it spends
above the bare forward and backward calls is overhead. (B) early: an undefended net, where most rows fall.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import platform
import statistics
import sys
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contenders import CLASSES, CONTENDERS, SHAPE, STEPS, Setting
from sparring.attacks.pgd import PGD
from sparring.core.threat import Linf
from sparring.engine.loop import run
from sparring.engine.process import keep_freed_memory
from sparring.models.nets import build
from sparring.models.torch import TorchModel

FULL_EPS, EARLY_EPS = 1e-4, 0.1
EARLY_ROWS = 1024  # of the 1,797 digits; the others are trained on
PACKAGES = ("sparring", "torch", "foolbox", "torchattacks", "adversarial-robustness-toolbox")

PASSES = ("forward_calls", "forward_rows", "backward_calls", "backward_rows")


class Counter(nn.Module):
    """A net that counts what passes through it: calls, and rows in all of them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.forward_calls = self.forward_rows = self.backward_calls = self.backward_rows = 0

    def forward(self, x: Tensor) -> Tensor:
        """The net's logits."""
        self.forward_calls, self.forward_rows = self.forward_calls + 1, self.forward_rows + len(x)
        logits = self.net(x)
        if logits.requires_grad:
            logits.register_hook(self._backward)
        return logits

    def _backward(self, cotangent: Tensor) -> None:
        self.backward_calls, self.backward_rows = self.backward_calls + 1, self.backward_rows + len(cotangent)


def say(text: str) -> None:
    """A line for whoever waits."""
    print(text, file=sys.stderr, flush=True)


def count(name: str, net: nn.Module, setting: Setting, x: Tensor, y: Tensor) -> dict[str, Any]:
    """One untimed run: the passes spent, and the share of rows still right afterwards."""
    counter = Counter(copy.deepcopy(net)).eval()
    attacked = CONTENDERS[name](counter, setting)(x, y)
    passes = {key: getattr(counter, key) for key in PASSES}
    return {"passes": passes, "robust_accuracy": accuracy(net, attacked, y)}


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of rows that `net` gets right."""
    with torch.no_grad():
        return float((net(x).argmax(1) == y).float().mean())


def enter(names: list[str], net: nn.Module, setting: Setting, x: Tensor, y: Tensor) -> dict[str, dict[str, Any]]:
    """Count for each of `names`, which also warms it up; who is not installed or fails stays out."""
    entered = {}
    for name in names:
        try:
            entered[name] = count(name, net, setting, x, y)
        except Exception as error:
            if name in ("bare", "sparring"):
                raise
            say(f"{name} is left out: {type(error).__name__}: {error}")
    return entered


def race(names: list[str], net: nn.Module, setting: Setting, x: Tensor, y: Tensor, rounds: int) -> dict[str, list]:
    """Seconds of each of `names` in each round; each round starts with another of them."""
    runners = {name: CONTENDERS[name](copy.deepcopy(net), setting) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            began = time.perf_counter()
            runners[name](x, y)
            seconds[name].append(time.perf_counter() - began)
        say("  ".join(f"{name} {taken[-1]:.2f} s" for name, taken in seconds.items()))
    return seconds


def compare(seconds: dict[str, list[float]], unit: str) -> dict[str, dict[str, Any]]:
    """Seconds over those of `unit` in the same round: median, least and greatest."""
    peers = [name for name in seconds if name not in ("bare", "sparring")]
    ratios = {name: [a / b for a, b in zip(taken, seconds[unit], strict=True)] for name, taken in seconds.items()}
    fastest = min(peers, key=lambda name: statistics.median(seconds[name]), default=None)
    behind = fastest and [a / b for a, b in zip(seconds["sparring"], seconds[fastest], strict=True)]
    return {
        "ratio": {name: round(statistics.median(values), 3) for name, values in ratios.items()},
        "spread": {name: [round(min(values), 3), round(max(values), 3)] for name, values in ratios.items()},
        "seconds": {name: round(statistics.median(taken), 3) for name, taken in seconds.items()},
        "fastest_peer": fastest,
        "sparring_over_fastest_peer": behind and round(statistics.median(behind), 3),
    }


def sure_rows(net: nn.Module, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """The `rows` surest of eight times as many random images, with the net's own answers as labels."""
    pool = torch.rand(8 * rows, *SHAPE, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        top = net(pool).topk(2, dim=1)
    order = (top.values[:, 0] - top.values[:, 1]).argsort(descending=True)[:rows]
    return pool[order], top.indices[order, 0]


def every_seat_full(rows: int, width: int, rounds: int, seed: int, frozen: bool) -> dict[str, Any]:
    """(A) no row leaves before its last step."""
    net = build("conv", SHAPE, CLASSES, seed).eval().requires_grad_(not frozen)
    x, y = sure_rows(net, rows, seed)
    setting = Setting(FULL_EPS, width)
    entered = enter(list(CONTENDERS), net, setting, x, y)
    outcome = run(TorchModel(net), PGD(), Linf(setting.eps), x, y, width=width)
    if outcome.found.any() or not ((outcome.forward == STEPS + 1) & (outcome.backward == STEPS)).all():
        raise SystemExit(f"expected no row to fall, got {int(outcome.found.sum())} of {rows}; try another --seed")
    result = compare(race(list(entered), net, setting, x, y, rounds), "bare")
    return {**result, "passes": {name: found["passes"] for name, found in entered.items()}}


def digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's 1,797 digits of 8 x 8 pixels, enlarged."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None] / 16
    large = F.interpolate(images, size=SHAPE[1:], mode="bilinear", align_corners=False)
    return large.clamp(0, 1), torch.from_numpy(bunch.target).long()


def trained(x: Tensor, y: Tensor, seed: int, steps: int = 1000) -> nn.Module:
    """An undefended `conv`."""
    net, generator = build("conv", SHAPE, CLASSES, seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(steps):
        index = torch.randint(len(x), (64,), generator=generator)
        loss = F.cross_entropy(net(x[index]), y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def early_exits(rows: int, width: int, rounds: int, seed: int, frozen: bool) -> dict[str, Any]:
    """(B) most rows fall on the way."""
    x, y = digits()
    rows = min(rows, EARLY_ROWS)
    say("training the undefended net")
    net = trained(x[:-EARLY_ROWS], y[:-EARLY_ROWS], seed).requires_grad_(not frozen)
    x, y = x[-rows:].contiguous(), y[-rows:]
    setting = Setting(EARLY_EPS, min(width, rows))
    entered = enter([name for name in CONTENDERS if name != "bare"], net, setting, x, y)
    result = compare(race(list(entered), net, setting, x, y, rounds), "sparring")
    result |= {key: {name: found[key] for name, found in entered.items()} for key in ("passes", "robust_accuracy")}
    return {**result, "accuracy": accuracy(net, x, y), "rows": rows, **asdict(setting)}


def versions() -> dict[str, str]:
    """Of Python and of every package that takes part."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Both parts, as one flat answer with the details beside it."""
    say(f"(A) every seat full: {args.rows} rows, width {args.width}, {args.rounds} rounds")
    full = every_seat_full(args.rows, args.width, args.rounds, args.seed, args.frozen)
    say("(B) an undefended net, where rows leave early")
    early = early_exits(args.rows, args.width, args.rounds, args.seed, args.frozen)
    return {
        **full.pop("ratio"),
        **full,
        "early": early.pop("ratio"),
        "early_details": early,
        **vars(args),
        "steps": STEPS,
        "eps": FULL_EPS,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def show(result: dict[str, Any]) -> None:
    """Two tables for people."""
    from rich.console import Console
    from rich.table import Table

    details = result["early_details"]
    parts = (
        (
            f"(A) every seat full, PGD-{STEPS}, {result['rows']} rows, width {result['width']}",
            "bare",
            result,
            result,
        ),
        (
            f"(B) early exits, linf eps {details['eps']:g}, {details['rows']} rows",
            "sparring",
            result["early"],
            details,
        ),
    )
    for title, unit, ratios, part in parts:
        table = Table(title=title)
        for head in (
            "",
            f"time / {unit}",
            "least to most",
            "seconds",
            "forward rows",
            "backward rows",
            "robust",
        ):
            table.add_column(head, justify="left" if not head else "right")
        for name, passes in part["passes"].items():
            least, most = part["spread"][name]
            robust = f"{part['robust_accuracy'][name]:.3f}" if "robust_accuracy" in part else "all"
            figures = (f"{ratios[name]:.3f}", f"{least:.3f} to {most:.3f}", f"{part['seconds'][name]:.2f}")
            table.add_row(name, *figures, f"{passes['forward_rows']:,}", f"{passes['backward_rows']:,}", robust)
        Console(width=110).print(table)


def main() -> None:
    """Parse, measure, print."""
    keep_freed_memory()  # for all contenders alike: without it the bare calls alone take a third longer
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024, help="images to attack, a multiple of the width")
    parser.add_argument("--width", type=int, default=256, help="rows in one model call")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds; the median counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--frozen", action="store_true", help="parameters ask for no gradient (spares some peers work)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else on stdout")
    args = parser.parse_args()
    if min(args.rows, args.width, args.rounds) < 1 or args.rows % args.width:
        parser.error("expected at least one round, and rows that are a multiple of the width")
    as_json = args.__dict__.pop("json")
    torch.manual_seed(args.seed)
    with contextlib.redirect_stdout(sys.stderr):  # peers may talk
        result = measure(args)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


if __name__ == "__main__":
    main()
