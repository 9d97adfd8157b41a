"""Training recipes from words, with what they need from the run: its threat model, an attack, a teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from sparring import catalog
from sparring.attacks.pgd import PGD
from sparring.catalog import Supply
from sparring.core.defense import Defense
from sparring.core.threat import Threat
from sparring.defenses.distillation import Distillation, Temperature
from sparring.models.checkpoint import Checkpoint

ATTACK = PGD(steps=7)  # what madry, mart, fast and awp train against: `sparring train` has the same
Teach = Callable[[Temperature], Checkpoint]
_OWN = "expected {name} without {key}, which is that of the run, got {key}={value}"


def recipe(text: str, threat: Threat, teach: Teach) -> Defense:
    """The recipe that `text` describes, such as `madry:warmup=0.2`; `teach` trains the teacher of a distillation."""
    supplies = {
        "threat": Supply(lambda *_: threat, _OWN),
        "attack": Supply(lambda *_: ATTACK, _OWN),
        "teacher": Supply(lambda _, given: teach(_temperature(given)), _OWN),
    }
    built: Defense = catalog.recipe(text, supplies)
    return built


def check(text: str, threat: Threat) -> None:
    """Refuse a recipe that `recipe` could not build, before anything is trained."""
    recipe(text, threat, _promised)


def _temperature(given: Mapping[str, str]) -> Temperature:
    """How the teacher of a distillation with these options is trained."""
    chosen = {"temperature": given.get("temperature", Distillation.temperature)}
    built: Temperature = catalog.build(catalog.defenses(), "recipe", "temperature", chosen)
    return built


def _promised(how: Temperature) -> Checkpoint:
    """The teacher that will be trained so, in name."""
    return Checkpoint(Path(), None, {"plan": {"recipe": {"options": repr(how)}}, "weights_sha256": ""})
