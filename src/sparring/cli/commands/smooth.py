"""`sparring smooth`: how far the model's vote under Gaussian noise keeps its class, with a stated probability."""

from __future__ import annotations

import csv
import io
import time
from dataclasses import fields
from typing import Annotated, Any

import torch
import typer

from sparring.auditing.plan import common
from sparring.auditing.run import Run
from sparring.certificates.smoothing import Smoothed, check_noise, largest_radius, smooth
from sparring.cli import options
from sparring.cli.show import Show
from sparring.core.showing import figure, percent, rounded
from sparring.data import Images, load
from sparring.models.spec import Named
from sparring.reporting import write_report

_DRAWS = 200_000  # a file of evidence: what a kill may cost
_LINES = 16  # of the table, at most


def command(
    model: Annotated[str, typer.Argument(help="A checkpoint, a .onnx or .keras file, a URL, or file.py:function.")],
    sigma: Annotated[float, typer.Option("--sigma", help="Of the noise, in the units of the input; such as 0.25.")],
    data: options.Data = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Draws that bound the share of a row's class.")] = 10_000,
    n0: Annotated[int, typer.Option("--n0", min=1, help="Draws that choose the class.")] = 100,
    alpha: Annotated[float, typer.Option("--alpha", help="Chance that a row's claim is false, at most.")] = 0.001,
    width: options.Width = None,
    max_queries: options.MaxQueries = None,
    data_dir: options.DataDir = None,
    limit: options.Limit = None,
    seed: options.Seed = 0,
    device: options.DeviceName = "auto",
    out: options.Out = None,
    json: options.Json = False,
) -> None:
    """Certify MODEL smoothed by Gaussian noise; again with the same --out, go on where it was cut short."""
    show, where = Show(json), options.device(device)
    check_noise(sigma, alpha)
    victim = options.victim(model, where, max_queries)
    images = load(options.dataset(data, victim), data_dir, on_status=show.say).test.take(limit)
    settings = {"sigma": sigma, "n": n, "n0": n0, "alpha": alpha, "width": width}
    plan = {
        "model": victim.name,
        "model_digest": victim.digest,
        "data": images.name,
        "rows": {"test": len(images)},
        "settings": settings,
        **common(images, seed, where),
    }
    run = Run.create(out, "smooth", plan)
    with options.counted(show, victim, run.path), show.progress():
        found, seconds = _in_parts(show, run, victim, images, settings | {"seed": seed}, where)
    _finish(show, run, victim, images, found, {"sigma": sigma, "n": n, "n0": n0, "alpha": alpha, "seconds": seconds})


def _in_parts(
    show: Show, run: Run, victim: Named, images: Images, how: dict[str, Any], device: str
) -> tuple[Smoothed, float]:
    """What is claimed of all rows, and the seconds it took; parts that an earlier run finished are not done again."""
    rows = max(1, _DRAWS // (how["n"] + how["n0"]))
    parts: list[dict[str, torch.Tensor]] = []
    for start in range(0, len(images), rows):
        section = f"smoothing-{start:06d}"
        if not (part := run.tensors(section)):
            some = images.select(torch.arange(start, min(start + rows, len(images))))
            x, y, ids = (tensor.to(device) for tensor in (some.x, some.y, some.ids))
            begin = time.perf_counter()
            claims = smooth(victim.model, x, y, sample=ids, **how)
            spent = torch.tensor([time.perf_counter() - begin], dtype=torch.float64)
            part = {field.name: getattr(claims, field.name).cpu() for field in fields(claims)} | {"seconds": spent}
            run.keep(section, part)
        parts.append(part)
        show.tick("smoothing", min(start + rows, len(images)), len(images))
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Smoothed(**{field.name: whole[field.name] for field in fields(Smoothed)}), whole["seconds"].sum().item()


def radii(sigma: float, largest: float) -> list[float]:
    """The table's radii: steps of 0.25 up to the largest that can be claimed; of sigma where those do not fit."""
    step = 0.25 if 0.25 <= largest < 0.25 * _LINES else sigma
    return [step * place for place in range(int(largest / step) + 1)]


def _finish(show: Show, run: Run, victim: Named, images: Images, found: Smoothed, asked: dict[str, Any]) -> None:
    """Store what was claimed, and tell it."""
    largest = largest_radius(asked["sigma"], asked["n"], asked["alpha"])
    wrong = found.prediction != found.y
    figures: dict[str, Any] = {
        "rows": len(images),
        "model": victim.name,
        "data": images.name,
        **asked,
        "certified": [[rounded(r), rounded(found.accuracy(r))] for r in radii(asked["sigma"], largest)],
        "average_radius": rounded(found.average_radius),
        "largest_radius": rounded(largest),
        "claimed": int(found.right.sum()),
        "wrong": int(wrong.sum()),
        "abstained": int((found.abstained & ~wrong).sum()),
        "forward": int(found.forward.sum()),
        "seconds": rounded(asked["seconds"], 3),
    }
    run.record("smoothing", figures, {"radius": found.radius, "right": found.right, "sample": images.ids})
    run.write("rows.csv", _rows_csv(images, found))
    run.write_result()
    report = write_report(run)
    _tell(show, figures)
    show.say(f"report: {report}")
    show.result(figures | {"report": str(report), "run": str(run.path), "queries": options.queries(victim)})


def _rows_csv(images: Images, found: Smoothed) -> bytes:
    """One image a line: what the smoothed classifier is claimed to say, and how far."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "label", "prediction", "abstained", "count", "lower", "radius", "forward"])
    columns = (images.ids, found.y, found.prediction, found.abstained.long(), found.count)
    reals = ([f"{value:.9g}" for value in column.tolist()] for column in (found.lower, found.radius))
    writer.writerows(zip(*(column.tolist() for column in columns), *reals, found.forward.tolist(), strict=True))
    return text.getvalue().encode()


def _tell(show: Show, figures: dict[str, Any]) -> None:
    show.table(
        f"{figures['model']} on {figures['rows']} rows of {figures['data']}, smoothed by noise of sigma "
        f"{figures['sigma']:g}: what n = {figures['n']:,} draws certify, at alpha {figures['alpha']:g}",
        ["L2 radius", "certified accuracy"],
        [[f"{radius:g}", percent(share)] for radius, share in figures["certified"]],
    )
    show.say(
        f"average certified radius {figure(figures['average_radius'])}; so many draws can claim "
        f"{figure(figures['largest_radius'])} at most"
    )
    show.say(
        f"nothing claimed of {figures['abstained'] + figures['wrong']:,} rows: of {figures['abstained']:,} the vote "
        f"was too close, of {figures['wrong']:,} the first {figures['n0']:,} draws named a wrong class"
    )
    show.say(
        f"no proof: each row's claim holds with probability {1 - figures['alpha']:.10g}, for the smoothed "
        f"classifier, not for the net alone"
    )
