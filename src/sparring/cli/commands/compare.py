"""`sparring compare`: attacks side by side, on the same images and by the same judge."""

from __future__ import annotations

from typing import Annotated

import typer

from sparring.cli import compared, options
from sparring.cli.show import Show
from sparring.comparison.select import norm_of, select, widest
from sparring.core.threat import Unbounded, threat
from sparring.data import load


def command(
    model: Annotated[str, typer.Argument(help="A checkpoint, a .onnx or .keras file, a URL, or file.py:function.")],
    attacks: Annotated[
        list[str],
        typer.Option("--attacks", help="all, linf, l2, l1, l0, gradient, score, label, or names; may be repeated."),
    ] = ["all"],  # noqa: B006  typer reads it and never writes to it
    data: options.Data = None,
    norm: Annotated[
        str | None, typer.Option("--norm", help=f"{options.NORMS} [default: that of --attacks, else l2].")
    ] = None,
    eps: Annotated[
        float | None,
        typer.Option("--eps", help="Radius [default: none: attacks that look for the nearest]."),
    ] = None,
    budget: options.Budget = None,
    target: Annotated[str | None, typer.Option("--target", help="A class number, or next.")] = None,
    eight_bit: Annotated[bool, typer.Option("--eight-bit", help="Judge images as 8-bit files hold them.")] = False,
    width: options.Width = None,
    max_queries: options.MaxQueries = None,
    data_dir: options.DataDir = None,
    limit: options.Limit = None,
    seed: options.Seed = 0,
    device: options.DeviceName = "auto",
    out: options.Out = None,
    json: options.Json = False,
) -> None:
    """Compare attacks on MODEL: success, distance, cost; again with the same --out, go on where it was cut short."""
    show, where = Show(json), options.device(device)
    norm = norm or norm_of(attacks) or "l2"
    victim = options.victim(model, where, max_queries)
    images = load(options.dataset(data, victim), data_dir, on_status=show.say).test.take(limit)
    free = eps is None and norm != Unbounded.norm
    limits = (
        widest(norm, images.x, victim.model.bounds)
        if free
        else threat(norm, options.radius(norm, eps), victim.model.bounds)
    )
    bounded = eps is not None
    chosen = select(attacks, limits, victim.model.access, bounded=bounded, targeted=target is not None)
    for reason in sorted(set(chosen.left_out.values())):
        names = [name for name, why in chosen.left_out.items() if why == reason]
        show.say(f"left out: {', '.join(names)} ({reason})")
    how = {"confidence": 0.0, "restarts": 1, "eight_bit": eight_bit, "width": width, "budget": budget}
    goal = compared.goal(target, images, needed=False)
    compared.play(
        show,
        out,
        compared.Contest("compare", victim, images, chosen.attacks, limits, not free, target, goal, seed, where, how),
    )
