"""`sparring train`: train one of our nets, plainly or hardened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from sparring import catalog
from sparring.auditing.plan import common
from sparring.auditing.run import Run
from sparring.catalog import Supply
from sparring.cli import options
from sparring.cli.show import Show
from sparring.core.attack import Attack
from sparring.core.defense import Defense
from sparring.core.errors import UsageError
from sparring.core.showing import percent
from sparring.core.threat import Threat, threat
from sparring.data import Dataset, load
from sparring.demo.train import figures_of, tiles
from sparring.models.checkpoint import Checkpoint, open_checkpoint
from sparring.models.nets import NETS
from sparring.models.wrap import wrap
from sparring.training.crew import follow, follows
from sparring.training.fit import Settings, fit, score
from sparring.training.holdback import HoldBack

_DEFAULT_ATTACK = "pgd:steps=7"
_HELD_BACK_ATTACK = "pgd:steps=10"
_HOLD_BACK = "Attack the last N training images instead of training on them; keep the weights that hold best."
_DEVICES = "Processes that share every minibatch; not needed under torchrun, which starts them itself."
_FLAG = "expected {0} for the {{key}} of {{name}}, got {{key}}={{value}}; give {0}"
_PATIENCE = "With --hold-back, end after N lines of the log without gain."
_RECIPES = (
    "standard, madry, trades, mart, fast, free, awp:inner=madry, ibp, crown_ibp, mtl_ibp, gaussian, label_smoothing, "
    "temperature, distillation:teacher=PATH; with options, such as trades:beta=6. See `sparring ls`."
)


def command(
    data: options.Data = "digits",
    net: Annotated[str, typer.Option("--net", help=f"One of {', '.join(NETS)}.")] = "conv",
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="[default: 2000, or --epochs]")] = None,
    epochs: Annotated[float | None, typer.Option("--epochs", min=0.01, help="Instead of --steps.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 128,
    rate: Annotated[float, typer.Option("--rate", help="The highest learning rate.")] = Settings.rate,
    shift: Annotated[int, typer.Option("--shift", min=0, help="Move images by up to N pixels.")] = Settings.shift,
    recipe: Annotated[str, typer.Option("--recipe", help=_RECIPES)] = "standard",
    norm: options.Norm = "linf",
    eps: options.Eps = None,
    attack: Annotated[
        str, typer.Option("--attack", help="What madry, mart, fast, awp and mtl_ibp train against.")
    ] = _DEFAULT_ATTACK,
    hold_back: Annotated[int | None, typer.Option("--hold-back", min=1, help=_HOLD_BACK)] = None,
    patience: Annotated[int | None, typer.Option("--patience", min=1, help=_PATIENCE)] = None,
    every: Annotated[int, typer.Option("--every", min=1, help="Steps between two lines.")] = Settings.every,
    data_dir: options.DataDir = None,
    limit: options.Limit = None,
    seed: options.Seed = 0,
    framework: options.Framework = "torch",
    device: options.DeviceName = "auto",
    devices: Annotated[int, typer.Option("--devices", min=1, help=_DEVICES)] = 1,
    out: options.Out = None,
    json: options.Json = False,
) -> None:
    """Train a net; again with the same --out, take up a training that was killed."""
    show, where = Show(json), options.device(device)
    if follows():  # torchrun started this process to help the first, which alone writes and prints
        follow(where)
        return
    defense, held = _defense(recipe, norm, eps, attack), _held(hold_back, patience, norm, eps)
    dataset = load(data or "digits", data_dir, on_status=show.say)
    dataset = Dataset(dataset.name, dataset.train.take(limit), dataset.test)
    rows = len(held.split(dataset)[0].train if held else dataset.train)
    length = _steps(steps, epochs, rows, batch_size)
    settings = Settings(net, length, batch_size, rate, shift=shift, seed=seed, every=every, framework=framework)
    plan = {
        "data": dataset.name,
        "rows": {"train": len(dataset.train), "test": len(dataset.test)},
        "settings": {**vars(settings), "recipe": repr(defense), **({"hold_back": repr(held)} if held else {})},
        **common(dataset.test, seed, where),
    }
    run = Run.create(out, "train", plan)
    with show.progress():
        checkpoint = fit(
            settings,
            dataset,
            defense,
            run.path / net,
            hold_back=held,
            device=where,
            devices=devices,
            on_step=lambda step: show.tick(f"training {net}", step, settings.steps),
            on_line=lambda line: show.say(str(line)),
        )
    answers = score(wrap(checkpoint.net), dataset.test, where)
    run.record("train", {net: figures_of(checkpoint.card)}, tiles(net, answers, dataset.test))
    run.write_result()
    _tell(show, checkpoint, run)


def _tell(show: Show, checkpoint: Checkpoint, run: Run) -> None:
    """Say how the training went."""
    card = checkpoint.card
    robust = f", robust on the images held back {percent(card['robust_accuracy'])}" if "best_step" in card else ""
    show.say(f"accuracy {percent(card['accuracy'])}{robust}, checkpoint: {checkpoint.path}")
    wanted = ("accuracy", "robust_accuracy", "best_step", "loss", "steps", "seconds", "cost_of_plain")
    said: dict[str, Any] = {key: card[key] for key in wanted if key in card}
    show.result(said | {"checkpoint": str(checkpoint.path), "run": str(run.path)})


def _steps(steps: int | None, epochs: float | None, rows: int, batch_size: int) -> int:
    if steps is not None and epochs is not None:
        raise UsageError("expected --steps or --epochs, got both")
    if epochs is not None:
        return max(1, round(epochs * max(1, rows // min(batch_size, rows))))
    return steps or 2000


def _defense(recipe: str, norm: str, eps: float | None, attack: str) -> Defense:
    """The recipe that `recipe` describes, with what it needs from the other options."""
    supplies = {
        "threat": Supply(lambda *_: _threat(norm, eps), _FLAG.format("--norm and --eps")),
        "attack": Supply(lambda *_: _attack(attack, norm), _FLAG.format("--attack")),
        "teacher": Supply(_teacher),
    }
    built: Defense = catalog.recipe(recipe, supplies)
    takes = _takes(built)
    if (eps is not None and "threat" not in takes) or (attack != _DEFAULT_ATTACK and "attack" not in takes):
        raise UsageError(f"--eps and --attack are for a recipe that takes them, not for {recipe}; try --recipe madry")
    if norm != "linf" and "threat" not in takes:
        raise UsageError(f"--norm is for a recipe that takes a threat model, not for {recipe}; try --recipe madry")
    return built


def _takes(recipe: Any) -> set[str]:
    """The options of a recipe and of what it is around."""
    own = {field.name for field in fields(recipe)}
    return own | _takes(recipe.inner) if "inner" in own else own


def _held(rows: int | None, patience: int | None, norm: str, eps: float | None) -> HoldBack | None:
    """The training images to hold back, and what attacks them."""
    if rows is None:
        if patience is not None:
            raise UsageError("expected --hold-back with --patience: the gain is measured on images held back")
        return None
    if eps is None:
        raise UsageError(
            "expected --eps with --hold-back, and a recipe that takes it; such as --recipe madry --eps 0.3"
        )
    return HoldBack(rows, _threat(norm, eps), _attack(_HELD_BACK_ATTACK, norm), patience)


def _threat(norm: str, eps: float | None) -> Threat:
    if norm == "unbounded":
        raise UsageError("expected a norm with a radius to train within, got unbounded; such as --norm l2 --eps 1")
    return threat(norm, options.radius(norm, eps))


def _attack(text: str, norm: str) -> Attack:
    built: Attack = catalog.attack(text)
    if norm not in built.norms or built.needs_target:
        means = "towards a class only" if built.needs_target else f"in {', '.join(built.norms)}"
        raise UsageError(f"expected an attack away from the labels in {norm}, got {built.name}, which works {means}")
    return built


def _teacher(name: str, given: Mapping[str, str]) -> Checkpoint:
    if "teacher" not in given:
        raise UsageError(
            f"expected a teacher for {name}: train one with --recipe temperature --out TEACHER, "
            f"then give --recipe {name}:teacher=TEACHER"
        )
    return open_checkpoint(Path(given["teacher"]))
