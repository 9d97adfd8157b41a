"""Which defenses a run looks at, from words, files and objects."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from sparring import catalog
from sparring.core.errors import UsageError
from sparring.core.threat import L1, L2, Linf
from sparring.defending.plan import BROKEN, CONTROL, DEFAULT, REFERENCE, entries, entry, split
from sparring.defending.recipes import check, recipe
from sparring.defenses.awp import AWP
from sparring.defenses.distillation import Temperature
from sparring.defenses.label_smoothing import LabelSmoothing
from sparring.defenses.madry import Madry
from sparring.guards.bit_depth import BitDepth
from sparring.guards.guard import Transform
from sparring.guards.jpeg import JPEG

LIMIT = Linf(0.3)
MINE = """
from dataclasses import dataclass
from typing import ClassVar
from sparring.guards.guard import Transform

@dataclass(frozen=True)
class Half(Transform):
    name: ClassVar[str] = "half"
    differentiable: ClassVar[bool] = True
    randomised: ClassVar[bool] = False

    def transform(self, x):
        return x / 2

@dataclass(frozen=True)
class Recipe:
    name: ClassVar[str] = "mine"
    version: ClassVar[int] = 1

    def loss(self, net, x, y, moment):
        return net(x).square().mean()

def number():
    return 3
"""


def test_the_undefended_net_and_the_control_are_always_there():
    for given in (None, [], ["madry"], ["undefended", "bit_depth", "madry"]):
        found = entries(given, LIMIT, 1)
        assert [(one.name, one.role) for one in found[:2]] == [("undefended", REFERENCE), (BROKEN, CONTROL)]
        assert [one.name for one in found].count(BROKEN) == 1
    assert [one.name for one in entries(None, LIMIT, 1)[2:]] == list(DEFAULT)
    assert "jpeg" not in [one.name for one in entries(None, LIMIT, 4)]
    assert "ibp" not in [one.name for one in entries(None, L1(3.0), 1)]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("madry,trades", ["madry", "trades"]),
        ("jpeg:quality=50,trades:beta=6,steps=3,fast", ["jpeg:quality=50", "trades:beta=6,steps=3", "fast"]),
        (" smoothing:sigma=0.5+gaussian , f.py:Mine,", ["smoothing:sigma=0.5+gaussian", "f.py:Mine"]),
    ],
)  # fmt: skip
def test_a_list_in_words(text, pieces):
    assert split(text) == pieces
    if "f.py" not in text:
        assert [one.name for one in entries(text, LIMIT, 1)[2:]] == pieces


def test_a_guard_around_a_hardened_net():
    found = entry("jpeg:quality=50+madry")
    assert (found.guard, found.recipe) == ("jpeg:quality=50", "madry")
    assert entry("madry+jpeg").guard == "jpeg"
    assert entry("jpeg").recipe == "standard"
    assert entry("madry").guard is None


def test_objects_and_files(tmp_path):
    assert entry(JPEG(50)).guard == JPEG(50)
    assert entry(BitDepth).guard == BitDepth()
    assert entry(LabelSmoothing(0.2)).recipe == LabelSmoothing(0.2)
    path = tmp_path / "mine_of_mine.py"
    path.write_text(MINE)
    half, own = entry(f"{path}:Half"), entry(f"{path}:Recipe")
    assert half.guard.name == "half"
    assert own.recipe.name == "mine"
    assert half.slug.endswith("mine_of_mine.py-Half")
    path.write_text(MINE + "\n")
    assert entry(f"{path}:Half").source != half.source


@dataclass(frozen=True)
class Silent(Transform):
    """Says nothing of itself."""

    def transform(self, x):
        return x


class Nameless:
    """A recipe that does not say what it is."""

    def loss(self, net, x, y, moment):
        return net(x).sum()


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["madri"], "did you mean 'madry'"),
        (["jpeg:qualty=3"], "did you mean 'quality'"),
        (["jpeg:quality=200"], "expected a quality of 1 to 95"),
        (["madry:warmpup=1"], "did you mean 'warmup'"),
        (["distillation:temprature=3"], "did you mean 'temperature'"),
        (["distillation:temperature=-3"], "expected a temperature above 0"),
        (["madry:threat=3"], "which is that of the run"),
        (["jpeg+median"], "expected one guard and one recipe at most"),
        (["madry+trades"], "expected one guard and one recipe at most"),
        (["madry", "madry"], "expected every defense once"),
        (["awp"], "such as awp:inner=madry"),
        (["awp:inner=madry,gama=3"], "did you mean 'gamma'|unknown option"),
        (["awp:inner=distillation"], "without a teacher|trains on points"),
        ([Silent()], "to state its name, differentiable, randomised and detects"),
        ([3], "to be a guard .* or a recipe with a loss"),
        ([Nameless()], "to state its name and its version"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_trained(given, why):
    with pytest.raises(UsageError, match=why):
        entries(given, LIMIT, 1)


def test_a_file_that_gives_neither(tmp_path):
    path = tmp_path / "neither_of_both.py"
    path.write_text(MINE)
    with pytest.raises(UsageError, match="to be a guard"):
        entry(f"{path}:number")
    with pytest.raises(UsageError, match="no file"):
        entry(f"{tmp_path / 'gone.py'}:number")


class Nameless(Transform):
    """No dataclass: it shows itself by its address, which is another in the next process."""

    name, differentiable, randomised = "nameless", True, False

    def transform(self, x):
        return x


class Addressed:
    name, version = "addressed", 1

    def loss(self, net, x, y, moment):
        return net(x).square().mean()


@pytest.mark.parametrize("given", [Nameless, Nameless(), Addressed()])
def test_what_a_run_that_is_taken_up_would_not_know_is_refused(given):
    with pytest.raises(UsageError, match="make it a frozen dataclass"):
        entry(given)


def test_recipes_get_what_the_run_has():
    threat = L2(1.5)
    taught = []

    def teach(wanted):
        taught.append(wanted)
        raise UsageError("enough")

    madry = recipe("madry:warmup=0.1", threat, teach)
    assert isinstance(madry, Madry)
    assert (madry.threat, madry.warmup, madry.attack.name) == (threat, 0.1, "pgd")
    awp = recipe("awp:inner=trades,beta=6,gamma=0.02", threat, teach)
    assert isinstance(awp, AWP)
    assert (awp.gamma, awp.inner.beta, awp.inner.threat) == (0.02, 6.0, threat)
    with pytest.raises(UsageError, match="enough"):
        recipe("distillation:temperature=10", threat, teach)
    assert taught == [Temperature(10.0)]


@pytest.mark.parametrize("name", sorted(catalog.defenses()))
def test_every_recipe_of_the_catalogue_can_be_asked_for(name):
    text, threat = f"{name}:inner=madry" if name == "awp" else name, Linf(0.1)
    check(text, threat)

    def teach(wanted):
        raise UsageError("taught")

    if name == "distillation":
        with pytest.raises(UsageError, match="taught"):
            recipe(text, threat, teach)
    else:
        assert recipe(text, threat, teach).name == name


@pytest.mark.parametrize("name", sorted(catalog.guards()))
def test_every_guard_of_the_catalogue_can_be_asked_for(name):
    assert entries([name], Linf(0.1), 1)[-1].name == name


def test_slugs_are_names_of_files():
    names = ["jpeg:quality=50", "smoothing+gaussian", "a/b.py:Mine"]
    assert all(re.fullmatch(r"[A-Za-z0-9.=_+-]+", entry(one).slug) for one in names[:2])
    assert entry(names[0]).slug == "jpeg-quality=50"
