"""What there is, by name: every attack, defense and guard that stands in its folder or that a plug-in names.

A plug-in is any installed package with an entry point in the group `sparring.attacks`, `sparring.defenses` or
`sparring.guards` that names a class. There is no registry to edit.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib.metadata import entry_points
from typing import Any, get_type_hints

from sparring.core.attack import Attack
from sparring.core.defense import Defense
from sparring.core.errors import UsageError, unknown
from sparring.guards.guard import Guard


def _family(package: str) -> dict[str, Any]:
    folder = importlib.import_module(f"sparring.{package}")
    found: dict[str, Any] = {}
    for info in pkgutil.iter_modules(folder.__path__):
        module = importlib.import_module(f"sparring.{package}.{info.name}")
        for value in vars(module).values():
            if isinstance(value, type) and value.__module__ == module.__name__ and "paper" in vars(value):
                found[vars(value)["name"]] = value
    for point in entry_points(group=f"sparring.{package}"):
        found[point.name] = point.load()
    return dict(sorted(found.items()))


def attacks() -> dict[str, type[Attack]]:
    """Every attack class by name."""
    return _family("attacks")


def defenses() -> dict[str, type[Defense]]:
    """Every defense class by name."""
    return _family("defenses")


def guards() -> dict[str, type[Guard]]:
    """Every guard class by name: defenses at inference, and detectors."""
    return _family("guards")


def parse(text: str) -> tuple[str, dict[str, str]]:
    """`name:option=value,option=value` in its parts."""
    name, _, rest = text.partition(":")
    options: dict[str, str] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"expected name:option=value, got {item!r} in {text!r}")
        options[key.strip()] = value.strip()
    return name.strip(), options


def _cast(owner: str, key: str, value: Any, hint: Any) -> Any:
    """`value` as the type of a dataclass field; strings come from the command line."""
    if not isinstance(value, str) or hint is str:
        return value
    kinds = [kind for kind in (int, float, bool, str) if kind is hint or kind in getattr(hint, "__args__", ())]
    if value.lower() in ("none", "") and type(None) in getattr(hint, "__args__", ()):
        return None
    for kind in kinds:
        if kind is bool and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    wanted = " or ".join(kind.__name__ for kind in kinds)
    raise UsageError(f"expected {wanted} for {key} of {owner}, got {value!r}")


def options(kind: str, family: dict[str, type[Any]], name: str) -> list[str]:
    """The names of the options of the class called `name`."""
    if name not in family:
        raise unknown(kind, name, family)
    return [field.name for field in fields(family[name])]


def build(family: dict[str, type[Any]], kind: str, name: str, given: dict[str, Any]) -> Any:
    """An instance of the class called `name`, with these options."""
    known = options(kind, family, name)
    cls = family[name]
    hints = get_type_hints(cls)
    for key in given:
        if key not in known:
            raise unknown(f"option of {name}", key, known)
    return cls(**{key: _cast(name, key, value, hints[key]) for key, value in given.items()})


def attack(text: str, **options: Any) -> Any:
    """The attack that `text` describes, such as `pgd` or `pgd:steps=10,step_size=0.01`."""
    name, given = parse(text)
    return build(attacks(), "attack", name, {**given, **options})


@dataclass(frozen=True)
class Supply:
    """Where the value of a recipe's option comes from, if not from its words."""

    make: Callable[[str, Mapping[str, str]], Any]  # given the recipe's name and its options in words
    refusal: str | None = None  # of a value in words, with {name}, {key} and {value}; None: `make` may use it


def recipe(text: str, supplies: Mapping[str, Supply]) -> Any:
    """The recipe that `text` describes, such as `madry:warmup=0.2` or `awp:inner=madry,warmup=0.2`.

    `supplies` has, by option, what a run gives to every recipe that takes it, such as its threat model. What is no
    option of a recipe around another goes to the inner one.
    """
    name, given = parse(text)
    takes = options("recipe", defenses(), name)
    chosen: dict[str, Any] = dict(given)
    if "inner" in takes:
        if "inner" not in given:
            raise UsageError(f"expected the recipe that {name} is around, such as {name}:inner=madry")
        rest = ",".join(f"{key}={value}" for key, value in given.items() if key not in takes)
        inner = recipe(f"{given['inner']}:{rest}", supplies)
        chosen = {key: value for key, value in given.items() if key in takes} | {"inner": inner}
    for key, supply in supplies.items():
        if key in takes:
            if key in given and supply.refusal:
                raise UsageError(supply.refusal.format(name=name, key=key, value=given[key]))
            chosen[key] = supply.make(name, given)
    return build(defenses(), "recipe", name, chosen)


def guard(text: str, **options: Any) -> Any:
    """The guard that `text` describes, such as `bit_depth:bits=2`."""
    name, given = parse(text)
    return build(guards(), "guard", name, {**given, **options})
