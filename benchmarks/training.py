"""What training buys: robust accuracy under the audit for each recipe and budget, in one table and on one chart.

A budget is counted in plain steps, the steps of training without a defense that take as long: a recipe that costs c
of them a step takes budget / c steps. c is measured first, turn by turn with plain steps, and again during the
training (`cost_of_plain` of its checkpoint), by which the table counts what was spent. Killed, it goes on with the
same --out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sparring  # before torch: see docs/decisions/003

# isort: split
import torch
from matplotlib.axes import Axes

from sparring.attacks.pgd import PGD
from sparring.core.defense import Defense
from sparring.core.threat import Linf
from sparring.data.images import Dataset
from sparring.defenses.fast import Fast
from sparring.defenses.free import Free
from sparring.defenses.ibp import IBP
from sparring.defenses.madry import Madry
from sparring.defenses.trades import TRADES
from sparring.reporting import charts
from sparring.training.fit import Settings, fit

ROUTES: dict[str, Callable[[Linf], Defense]] = {
    "one step (fast)": lambda threat: Fast(PGD(steps=7), threat),
    "free": lambda threat: Free(threat),
    "PGD-7": lambda threat: Madry(PGD(steps=7), threat),
    "PGD-40": lambda threat: Madry(PGD(steps=40), threat),
    "TRADES": lambda threat: TRADES(threat, beta=1.0),
    "IBP": lambda threat: IBP(threat),
}
BUDGETS = (2_000, 8_000, 32_000)  # plain steps
SHORT = 100  # steps of the training that tells what a step costs


def priced(net: str, route: str, data: Dataset, threat: Linf, rate: float, folder: Path) -> float:
    """Plain steps that one step of `route` takes."""
    short = fit(Settings(net, SHORT, rate=rate), data, ROUTES[route](threat), folder / f"{route}-price.safetensors")
    cost: float = short.card["cost_of_plain"]
    return cost


def bought(
    net: str, route: str, steps: int, data: Dataset, threat: Linf, rate: float, rows: int, folder: Path
) -> dict[str, Any]:
    """Train for so many steps and audit what came of it on the first `rows` test images."""
    stem = folder / f"{route}-{steps}"
    trained = fit(
        Settings(net, steps, rate=rate, every=steps), data, ROUTES[route](threat), Path(f"{stem}.safetensors")
    )
    found = sparring.audit(trained.net, data, threat, limit=rows, certify=False, out=f"{stem}-audit")
    card = trained.card
    return {
        "route": route, "steps": steps, "cost_of_plain": card["cost_of_plain"],
        "spent": round(steps * card["cost_of_plain"]), "seconds": card["seconds"],
        "clean": found.clean_accuracy, "robust": found.robust_accuracy[1], "warnings": found.warnings,
    }  # fmt: skip


def chart(lines: list[dict[str, Any]], title: str) -> str:
    """Robust accuracy over what was spent, as an SVG file."""
    routes = [route for route in ROUTES if any(line["route"] == route for line in lines)]

    def draw(axes: Axes) -> None:
        for place, route in enumerate(routes):
            points = sorted((line["spent"], line["robust"]) for line in lines if line["route"] == route)
            charts.series(place).plot(axes, *zip(*points, strict=True))
            axes.lines[-1].set_label(route)
        charts.log_axis(axes, "x", "spent on training, in plain steps")
        charts.percent_axis(axes, title)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))

    return charts.standalone(charts.svg("training", draw, (7.0, 4.2)))


def main() -> None:
    """Print the table, and write it and the chart to --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--net", default="conv")
    parser.add_argument("--eps", type=float, default=0.3)
    parser.add_argument("--rate", type=float, default=Settings.rate)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--routes", default=",".join(ROUTES))
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)), help="in plain steps")
    parser.add_argument("--out", type=Path, default=Path("runs/training"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    data_dir = Path(os.environ["SPARRING_DATA"]) if "SPARRING_DATA" in os.environ else None
    data = sparring.load(options.data, data_dir, on_status=lambda said: print(said, file=sys.stderr))
    threat, lines = Linf(options.eps), []
    print(f"{'recipe':<18}{'steps':>8}{'a step':>9}{'spent':>9}{'seconds':>9}{'clean':>9}{'robust':>9}  signs")
    for route in options.routes.split(","):
        cost = priced(options.net, route, data, threat, options.rate, options.out)
        for budget in map(int, options.budgets.split(",")):
            steps = max(1, round(budget / cost, -1))
            line = bought(options.net, route, int(steps), data, threat, options.rate, options.rows, options.out)
            lines.append(line)
            print(f"{route:<18}{line['steps']:>8}{line['cost_of_plain']:>9.2f}{line['spent']:>9}{line['seconds']:>9.0f}"
                  f"{line['clean']:>9.1%}{line['robust']:>9.1%}  {len(line['warnings'])}", flush=True)  # fmt: skip
    (options.out / "training.json").write_text(json.dumps(lines, indent=1))
    (options.out / "training.svg").write_text(
        chart(lines, f"robust at {threat.describe()}, of {options.rows} images")
    )


if __name__ == "__main__":
    main()
