"""The nets of a run: trained once, kept in its folder, taken up when a training was cut short."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from torch import nn

from sparring import catalog
from sparring.core.defense import Defense
from sparring.core.model import Model
from sparring.core.showing import percent
from sparring.core.threat import Threat
from sparring.data.images import Dataset
from sparring.defending.plan import ENSEMBLE, MEMBERS, PLAIN, Entry, slug
from sparring.defending.recipes import recipe
from sparring.defenses.distillation import Temperature
from sparring.guards.detector import Detector
from sparring.guards.guard import Guard, Guarded
from sparring.models.checkpoint import Checkpoint
from sparring.models.eot import apart
from sparring.models.torch import TorchModel
from sparring.training.fit import Settings, fit

RATE = 0.05  # of clean images that a detector may flag: Xu et al. 2018 and others allow as many
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Subject:
    """A defense ready to be asked and attacked."""

    entry: Entry
    key: str  # of its net
    net: nn.Module  # bare, in eval mode
    guard: Guard | None
    others: tuple[str, ...]  # of further nets that it uses

    @property
    def deployed(self) -> nn.Module:
        """What answers a user; of a random guard one draw a call."""
        return self.net if self.guard is None else Guarded(self.guard, self.net)

    def judged(self, draws: int) -> Model:
        """What decides whether an image breaks it; of a random guard so many draws together."""
        return TorchModel(self.net) if self.guard is None else self.guard.judged(self.net, draws)

    def adaptive(self, draws: int) -> Model:
        """What somebody attacks who knows it."""
        return TorchModel(self.net) if self.guard is None else self.guard.adaptive(self.net, draws)


@dataclass
class Workshop:
    """Trains what is asked for, each net once, all by the same settings on the same images.

    The last sixth of the training images is kept from every net: detectors get their threshold there.
    """

    folder: Path
    data: Dataset
    settings: Settings
    threat: Threat
    device: str
    tell: Tell
    say: Callable[[str], None] = lambda _: None
    made: dict[str, Checkpoint] = field(default_factory=dict)
    teachers: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of each net

    def __post_init__(self) -> None:
        """Set the last sixth apart."""
        train, self.held_out = self.data.with_validation()
        self.trained_on = Dataset(self.data.name, train, self.data.test)

    def subject(self, entry: Entry) -> Subject:
        """Train what `entry` needs, and put its guard together."""
        key = self._train(entry.recipe)
        net: nn.Module = self.made[key].net
        others = self.teachers[key]
        guard = entry.guard
        if isinstance(guard, str) and catalog.parse(guard)[0] == ENSEMBLE:
            members = tuple(self._train(entry.recipe, member) for member in range(1, MEMBERS + 1))
            others += members
            guard = catalog.guard(guard, others=tuple(self.made[member].net for member in members))
        elif isinstance(guard, str):
            guard = catalog.guard(guard)
        if guard is not None:
            Guarded(guard, net).to(self.device)  # what it holds moves in place
        if isinstance(guard, Detector) and guard.threshold is None:
            rows = self.held_out.x.to(self.device)
            with apart(rows.device) as seed:
                seed(self.settings.seed)  # of one that draws, so that a run that is taken up has the same threshold
                guard = guard.fitted(net, rows, RATE)
        return Subject(entry, key, net, guard, others)

    def cost(self, subject: Subject) -> float:
        """What training all nets that `subject` uses costs, as a multiple of the undefended net.

        All take as many steps, and those of each recipe were timed beside plain ones (`training.cost`).
        """
        cards = [self.made[key].card for key in (subject.key, *subject.others)]
        plain = [card["plan"]["recipe"]["name"] == PLAIN for card in cards]  # which cost 1, whatever was timed
        costs = [1.0 if known else card["cost_of_plain"] for known, card in zip(plain, cards, strict=True)]
        return float(round(sum(costs), 2))

    def _train(self, wanted: str | Defense, member: int = 0) -> str:
        """Train by a recipe, once; returns the key of the net. Members of an ensemble differ by their seed."""
        key = (wanted if isinstance(wanted, str) else _name(wanted)) + (f"-{member}" if member else "")
        if key in self.made:
            return key
        teachers: list[str] = []

        def teach(how: Temperature) -> Checkpoint:
            teachers.append(self._train(how))
            return self.made[teachers[-1]]

        built = recipe(wanted, self.threat, teach) if isinstance(wanted, str) else wanted
        settings = replace(self.settings, seed=self.settings.seed + 1000 * member)
        file = self.folder / f"{slug(key)}.safetensors"
        tick = partial(self._tick, key)
        self.made[key] = fit(settings, self.trained_on, built, file, device=self.device, on_step=tick)
        self.teachers[key] = tuple(teachers)
        self.say(f"trained {key}: clean accuracy {percent(self.made[key].card['accuracy'])}")
        return key

    def _tick(self, key: str, step: int) -> None:
        self.tell(f"training {key}", step, self.settings.steps)


def _name(recipe: Defense) -> str:
    """What tells a recipe that is an object from others."""
    return f"{recipe.name}-{hashlib.sha256(repr(recipe).encode()).hexdigest()[:8]}"
