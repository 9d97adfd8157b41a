"""Which defenses a run looks at: by name, from a file, or as objects; two that it cannot do without are always in."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sparring import catalog
from sparring.core.defense import Defense
from sparring.core.errors import UsageError, unknown
from sparring.core.threat import Threat
from sparring.defending import recipes
from sparring.guards.guard import Guard
from sparring.models.spec import load_object

REFERENCE, CONTROL, DEFENSE = "reference", "control", "defense"
UNDEFENDED = "undefended"
BROKEN = "bit_depth"  # known to give way to BPDA: Athalye et al. 2018, arXiv:1802.00420, section 5.3
PLAIN = "standard"
ENSEMBLE = "ensemble"  # its other nets are trained here
MEMBERS = 2
DEFAULT = (
    "madry", "trades", "fast", "ibp", "distillation", "label_smoothing",
    "jpeg", "binarise", "median", "feature_squeezing", "random_resize_pad", "smoothing+gaussian", ENSEMBLE,
)  # fmt: skip

Given = str | Guard | Defense | type[Any]


@dataclass(frozen=True)
class Entry:
    """One line of the table: a net trained by a recipe, and what stands around it when it answers."""

    name: str
    role: str = DEFENSE
    recipe: str | Defense = PLAIN
    guard: str | Guard | None = None
    source: str | None = None  # SHA-256 of the file that it comes from

    @property
    def slug(self) -> str:
        """The name as a file may have it."""
        return slug(self.name)

    def asked(self) -> dict[str, Any]:
        """What the plan of a run says of it."""
        told = {"recipe": repr(self.recipe), "guard": None if self.guard is None else repr(self.guard)}
        return told | {"role": self.role, "source": self.source}


def slug(name: str) -> str:
    """`name` as a file may have it."""
    return re.sub(r"[^A-Za-z0-9.=_+-]+", "-", name).strip("-.")


def entries(given: Sequence[Given] | None, threat: Threat, channels: int) -> tuple[Entry, ...]:
    """The undefended net, the control, and every defense of `given` once (None: `DEFAULT`, as far as it fits)."""
    wanted: Sequence[Given] = fitting(channels, threat.norm) if given is None else given
    if isinstance(wanted, str):
        wanted = split(wanted)
    found = [Entry(UNDEFENDED, REFERENCE), Entry(BROKEN, CONTROL, guard=BROKEN)]
    found += [entry(one) for one in wanted if one not in (UNDEFENDED, BROKEN, PLAIN)]
    for other in found:
        if isinstance(other.recipe, str):
            recipes.check(other.recipe, threat)
        if isinstance(other.guard, str) and catalog.parse(other.guard)[0] != ENSEMBLE:
            catalog.guard(other.guard)
    slugs = [other.slug for other in found]
    if twice := sorted({slug for slug in slugs if slugs.count(slug) > 1}):
        raise UsageError(f"expected every defense once, got {', '.join(twice)} more than once; name each apart")
    return tuple(found)


def fitting(channels: int, norm: str) -> tuple[str, ...]:
    """The default defenses for images of so many channels, in this norm."""
    unfit = {"jpeg": channels not in (1, 3), "ibp": norm not in ("linf", "l2")}
    return tuple(name for name in DEFAULT if not unfit.get(name, False))


def split(text: str) -> list[str]:
    """`a,b:option=1,option=2,c` set apart: a piece with = and without : goes on with the options before it."""
    found: list[str] = []
    for piece in filter(None, (part.strip() for part in text.split(","))):
        if "=" in piece and ":" not in piece and found:
            found[-1] += f",{piece}"
        else:
            found.append(piece)
    return found


def entry(given: Given) -> Entry:
    """What `given` describes: `madry`, `jpeg:quality=50`, `smoothing+gaussian`, `file.py:Name`, or an object."""
    if not isinstance(given, str):
        made = _made(given, getattr(given, "__name__", type(given).__name__))
        return _entry(str(getattr(made, "name", type(made).__name__)), [made], None)
    pieces = [piece.strip() for piece in given.split("+")]
    return _entry(given.strip(), [_piece(piece) for piece in pieces], _digest(pieces))


def _entry(name: str, parts: Sequence[str | Guard | Defense], source: str | None) -> Entry:
    """A guard, a recipe, or one of each."""
    guards = [part for part in parts if _is_guard(part)]
    training = [part for part in parts if not _is_guard(part)]
    if len(guards) > 1 or len(training) > 1:
        raise UsageError(f"expected one guard and one recipe at most, got {name}; such as smoothing+gaussian")
    if any(type(part).__repr__ is object.__repr__ for part in parts):
        raise UsageError(
            f"expected {name} to show its options, by which a run that is taken up knows it; make it a "
            f"frozen dataclass"
        )
    guard = cast("str | Guard | None", guards[0] if guards else None)
    recipe = cast("str | Defense", training[0] if training else PLAIN)
    return Entry(name, DEFENSE, recipe, guard, source)


def _is_guard(part: str | Guard | Defense) -> bool:
    return isinstance(part, Guard) or (isinstance(part, str) and catalog.parse(part)[0] in catalog.guards())


def _piece(text: str) -> str | Guard | Defense:
    """A name of the catalogue as it is, or what a file gives."""
    file, colon, name = text.rpartition(":")
    if colon and (file.endswith(".py") or "." in file) and name.isidentifier():
        return _made(load_object(text), text)
    name = catalog.parse(text)[0]
    known = {**catalog.guards(), **catalog.defenses()}
    if name not in known:
        raise unknown("defense", name, known)
    return text


def _made(given: object, what: str) -> Guard | Defense:
    """An instance that says what the analysis must know of it."""
    made: Any = given() if isinstance(given, type) else given
    if isinstance(made, Guard):
        said = [getattr(made, claim, None) for claim in ("differentiable", "randomised", "detects")]
        if not all(isinstance(claim, bool) for claim in said) or not isinstance(getattr(made, "name", None), str):
            raise UsageError(f"expected {what} to state its name, differentiable, randomised and detects, got {said}")
        return made
    if not callable(getattr(made, "loss", None)):
        raise UsageError(f"expected {what} to be a guard (see sparring.guards.guard) or a recipe with a loss")
    if not isinstance(getattr(made, "name", None), str) or not isinstance(getattr(made, "version", None), int):
        raise UsageError(f"expected {what} to state its name and its version, as every recipe does")
    return cast(Defense, made)


def _digest(pieces: Sequence[str]) -> str | None:
    """SHA-256 of the files that are named, so that a run is not taken up with another defense of the same name."""
    files = [Path(piece.rpartition(":")[0]) for piece in pieces if piece.rpartition(":")[0].endswith(".py")]
    there = b"".join(file.read_bytes() for file in files if file.is_file())
    return hashlib.sha256(there).hexdigest() if there else None
