"""Training recipes from words, with what they need from the run: its threat model, an attack, a teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparring import catalog
from sparring.attacks.pgd import PGD
from sparring.core.defense import Defense
from sparring.core.errors import UsageError
from sparring.core.threat import Threat
from sparring.defenses.distillation import Distillation, Temperature
from sparring.models.checkpoint import Checkpoint

ATTACK = PGD(steps=7)  # what madry, mart, fast and awp train against: `sparring train` has the same
Teach = Callable[[Temperature], Checkpoint]


def recipe(text: str, threat: Threat, teach: Teach) -> Defense:
    """The recipe that `text` describes, such as `madry:warmup=0.2`; `teach` trains the teacher of a distillation."""
    options, takes, name = _options(text, threat)
    if "inner" in takes:
        inner = ",".join(f"{key}={value}" for key, value in options.items() if key not in takes)
        own = {key: value for key, value in options.items() if key in takes}
        options = own | {"inner": recipe(f"{own['inner']}:{inner}", threat, teach)}
    if "teacher" in takes:
        options["teacher"] = teach(_temperature(options))
    built: Defense = catalog.build(catalog.defenses(), "recipe", name, options)
    return built


def check(text: str, threat: Threat) -> None:
    """Refuse a recipe that `recipe` could not build, before anything is trained."""
    options, takes, name = _options(text, threat)
    if "teacher" not in takes:
        recipe(text, threat, _nobody)
        return
    _temperature(options)
    catalog.build(catalog.defenses(), "recipe", "temperature", {})
    if unfit := set(options) - set(takes):
        catalog.build(catalog.defenses(), "recipe", name, dict.fromkeys(unfit))  # says which are known


def _options(text: str, threat: Threat) -> tuple[dict[str, Any], list[str], str]:
    """The options that are given and that the run adds, the names of those that the recipe takes, and its own."""
    name, given = catalog.parse(text)
    takes = catalog.options("defense", catalog.defenses(), name)
    for key in ("threat", "attack", "teacher"):
        if key in given and key in takes:
            raise UsageError(f"expected {name} without {key}, which is that of the run, got {key}={given[key]}")
    if "inner" in takes and "inner" not in given:
        raise UsageError(f"expected the recipe that {name} is around, such as {name}:inner=madry")
    options: dict[str, Any] = dict(given)
    if "threat" in takes:
        options["threat"] = threat
    if "attack" in takes:
        options["attack"] = ATTACK
    return options, takes, name


def _temperature(options: dict[str, Any]) -> Temperature:
    """How the teacher of a distillation with these options is trained."""
    chosen = {"temperature": options.get("temperature", Distillation.temperature)}
    built: Temperature = catalog.build(catalog.defenses(), "recipe", "temperature", chosen)
    return built


def _nobody(_: Temperature) -> Checkpoint:
    raise UsageError("expected a recipe without a teacher inside another; name distillation alone")
