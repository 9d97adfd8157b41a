"""Chapter 1: train the two nets, and look at what they get right and wrong."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparring.core.defense import Defense
from sparring.data.images import Images, to_bytes
from sparring.defenses.standard import Standard
from sparring.demo.stage import Stage
from sparring.models.checkpoint import Checkpoint
from sparring.training.fit import Score, Settings, fit, score

TILES = 12


def train_one(stage: Stage, name: str, settings: Settings, defense: Defense) -> Checkpoint:
    """Train a net, store it in the run, and put it on the stage as `name`."""
    checkpoint = fit(
        settings,
        stage.data,
        defense,
        stage.run.path / name,
        device=stage.device,
        on_step=lambda step: stage.tick(f"training {name}", step, settings.steps),
        on_line=lambda line: stage.say(str(line)),
    )
    stage.nets[name] = checkpoint.net
    return checkpoint


def tell(stage: Stage) -> None:
    """Train `dense` and `conv`."""
    figures: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, steps in (("dense", stage.scale.dense_steps), ("conv", stage.scale.conv_steps)):
        stage.say(f"training {name} for {steps} steps")
        card = train_one(stage, name, stage.settings(name, steps), Standard()).card
        figures[name] = figures_of(card)
        tensors |= tiles(name, score(stage.model(name), stage.data.test, stage.device), stage.data.test)
    stage.record("train", figures, tensors)


def figures_of(card: dict[str, Any]) -> dict[str, Any]:
    """What the report says of a training."""
    wanted = ("parameters", "steps", "accuracy", "loss", "robust_accuracy", "best_step", "seconds", "log")
    plain = card["plan"]["recipe"]["name"] == Standard.name
    told = wanted if plain else (*wanted, "cost_of_plain")
    return {key: card[key] for key in told if key in card}


def tiles(name: str, result: Score, images: Images) -> dict[str, Tensor]:
    """The first images a net gets right, and the first it gets wrong."""
    right = result.labels == images.y
    found: dict[str, Tensor] = {}
    for word, mask in (("right", right), ("wrong", ~right)):
        index = mask.nonzero().squeeze(1)[:TILES]
        found |= {
            f"{name}_{word}_x": to_bytes(images.x[index]),
            f"{name}_{word}_y": images.y[index],
            f"{name}_{word}_prediction": result.labels[index],
            f"{name}_{word}_confidence": result.confidence[index].float(),
        }
    return found
