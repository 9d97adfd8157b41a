"""`sparring attack`: attack a model on test images, and keep what was found."""

from __future__ import annotations

from typing import Annotated

import typer

from sparring import catalog
from sparring.cli import compared, options
from sparring.cli.show import Show
from sparring.core.attack import Attack
from sparring.core.threat import Threat, Unbounded, threat
from sparring.data import load


def command(
    model: Annotated[str, typer.Argument(help="A checkpoint, a .onnx or .keras file, a URL, or file.py:function.")],
    attack: Annotated[list[str], typer.Option("--attack", help="Such as pgd:steps=10; may be repeated.")],
    data: options.Data = None,
    norm: Annotated[
        str | None, typer.Option("--norm", help=f"{options.NORMS} [default: the attack's first].")
    ] = None,
    eps: options.Eps = None,
    target: Annotated[str | None, typer.Option("--target", help="A class number, or next.")] = None,
    confidence: Annotated[float, typer.Option("--confidence", help="What the model must give its answer.")] = 0.0,
    restarts: Annotated[int, typer.Option("--restarts", min=1)] = 1,
    eight_bit: Annotated[bool, typer.Option("--eight-bit", help="Judge images as 8-bit files hold them.")] = False,
    budget: options.Budget = None,
    width: options.Width = None,
    max_queries: options.MaxQueries = None,
    data_dir: options.DataDir = None,
    limit: options.Limit = None,
    seed: options.Seed = 0,
    device: options.DeviceName = "auto",
    out: options.Out = None,
    json: options.Json = False,
) -> None:
    """Attack MODEL on the test images of --data; every image found is stored and judged again."""
    show, where = Show(json), options.device(device)
    attacks = {text: catalog.attack(text) for text in attack}
    limits = _threat(norm, eps, list(attacks.values()))
    victim = options.victim(model, where, max_queries)
    images = load(options.dataset(data, victim), data_dir, on_status=show.say).test.take(limit)
    goal = compared.goal(target, images, any(a.needs_target for a in attacks.values()))
    how = {"confidence": confidence, "restarts": restarts, "eight_bit": eight_bit, "width": width, "budget": budget}
    compared.play(
        show,
        out,
        compared.Contest("attack", victim, images, list(attacks), limits, True, target, goal, seed, where, how),
    )


def _threat(norm: str | None, eps: float | None, attacks: list[Attack]) -> Threat:
    """What was asked for, or else what the first attack works in: without --eps, no bound if it needs none."""
    if norm is None:
        free = eps is None and all(Unbounded.norm in attack.norms for attack in attacks)
        norm = Unbounded.norm if free else attacks[0].norms[0]
    return threat(norm, options.radius(norm, eps))
