"""`sparring demo`: the whole story, one report."""

from __future__ import annotations

from typing import Any

from sparring.cli import options
from sparring.cli.show import Show
from sparring.core.errors import DataError
from sparring.core.showing import figure, percent
from sparring.data import Dataset, available, load
from sparring.demo.stage import Scale, Stage


def command(
    data: options.Data = None,
    data_dir: options.DataDir = None,
    limit: options.Limit = None,
    seed: options.Seed = 0,
    framework: options.Framework = "torch",
    device: options.DeviceName = "auto",
    out: options.Out = None,
    json: options.Json = False,
) -> None:
    """Train, attack, improve, defend: on MNIST where it is at hand, else on the embedded digits."""
    from sparring.demo import story

    show, where = Show(json), options.device(device)
    dataset = _choose(show, data, data_dir)
    scale = Scale.fitting(dataset)
    run = story.open_run(out, dataset, scale, seed, where, limit, framework)
    with show.progress():
        stage = Stage(dataset, scale, run, seed, where, framework, limit, show.say, show.tick)
        figures, report = story.tell(stage)
    _tables(show, figures)
    show.say(f"report: {report}")
    show.result(figures | {"report": str(report), "run": str(run.path)})


def _choose(show: Show, data: str | None, data_dir: options.DataDir) -> Dataset:
    if data is not None:
        return load(data, data_dir, on_status=show.say)
    try:
        return load("mnist", data_dir, on_status=show.say if available("mnist", data_dir) else lambda _: None)
    except DataError as error:
        if available("mnist", data_dir):
            raise  # it is there, and damaged: say so instead of passing it over
        reason = "MNIST was found nowhere and could not be downloaded"
        show.say(f"{reason}: using the embedded 8x8 digits ({str(error).splitlines()[0][:80]})")
        return load("digits")


def _tables(show: Show, figures: dict[str, Any]) -> None:
    """The story in two tables."""
    train, fooling, targeted = figures["train"], figures["fooling"], figures["targeted"]
    classic, improved, named = targeted["classic"], targeted["improved"], targeted["named"]
    story = [[f"accuracy of {net}", percent(train[net]["accuracy"])] for net in train]
    story += [
        [
            "noise read as a class of choice",
            f"{fooling['reached']} of {sum(map(len, fooling['nets'].values()))}",
        ],
        ["least confidence there", percent(fooling["min_confidence"])],
        ["picture read as a class of choice, classic", f"{classic['reached']} of {classic['pairs']}"],
        ["the same, improved", f"{improved['reached']} of {improved['pairs']}"],
        ["mean L2, improved", figure(improved["mean_l2"])],
        [
            f"mean L2 where both get named at all ({named['both_pairs']} pairs)",
            f"{figure(named['classic_mean_l2'])} classic, {figure(named['improved_mean_l2'])} improved",
        ],
    ]
    show.table("The story", ["step", "figure"], story)
    attacks = figures["compare"]["attacks"]
    show.table(
        "Attacks on conv, the same rows",
        ["attack", "threat", "success", "mean Linf", "mean L2", "passes/row", "seconds"],
        [
            [
                entry["name"],
                entry["threat"],
                percent(entry["success"]),
                figure(entry["mean_linf"]),
                figure(entry["mean_l2"]),
                figure((entry["forward"] + entry["backward"]) / figures["compare"]["rows"], 1),
                figure(entry["seconds"], 2),
            ]
            for entry in attacks
        ],
    )
    models = figures["defend"]["models"]
    grid = list(models["madry"]["robust"])
    show.table(
        "Accuracy under attack (an upper bound on robust accuracy)",
        ["eps", *models],
        [["clean", *(percent(m["clean"], 1) for m in models.values())]]
        + [[eps, *(percent(m["robust"][eps], 1) for m in models.values())] for eps in grid],
    )
