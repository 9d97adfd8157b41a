"""VNN-LIB 1.0: properties of a network as text, https://www.vnnlib.org.

A property names the unsafe points: inputs X_i in boxes whose outputs Y_j satisfy linear inequalities, with `and` and
`or` anywhere. The network is safe if no such point exists.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from sparring.core.errors import UsageError
from sparring.core.files import unzipped

_MOST = 100_000  # alternatives of one property
_TOKEN = re.compile(r"""(?P<skip>[ \t\r]+|;[^\n]*)|(?P<line>\n)|(?P<word>[()]|\|[^|]*\||[^\s();|"]+)|(?P<odd>.)""")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_VARIABLE = re.compile(r"([XY])_(\d+)")


@dataclass(frozen=True)
class Conjunction:
    """The outputs y with a y + b <= 0, all rows of it."""

    a: Tensor  # (s, outputs) float64
    b: Tensor  # (s,)


@dataclass(frozen=True)
class Case:
    """A point is unsafe if it lies in the box [low, high] and its outputs in one of `unsafe`."""

    low: Tensor  # (inputs,) float64
    high: Tensor
    unsafe: tuple[Conjunction, ...]


@dataclass(frozen=True)
class Property:
    """The unsafe points are those of any of the `cases`."""

    inputs: int
    outputs: int
    cases: tuple[Case, ...]


def read_property(path: str | Path) -> Property:
    """The property stored at `path`, a .vnnlib or .vnnlib.gz file."""
    try:
        text = unzipped(Path(path)).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UsageError(f"expected a VNN-LIB file, could not read {path}: {error}") from error
    return parse(text, str(path))


def parse(text: str, source: str = "property") -> Property:
    """The property that `text` says; `UsageError`, naming `source` and the line, for what VNN-LIB 1.0 has not."""
    try:
        return _normal(list(_forms(_tokens(text))))
    except _Fault as fault:
        raise UsageError(f"{source}, line {fault.line}: {fault}") from None
    except RecursionError:
        raise UsageError(f"{source}: expected formulas that are nested a few times, got hundreds") from None


class _Fault(Exception):
    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


@dataclass(frozen=True)
class _Form:
    """A word, or a list of forms."""

    line: int
    word: str
    parts: tuple[_Form, ...] = ()

    @property
    def head(self) -> str:
        """What a list begins with."""
        return self.parts[0].word if self.parts else ""

    def __str__(self) -> str:
        text = f"({' '.join(map(str, self.parts))})" if not self.word else self.word
        return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True)
class _Sum:
    """Terms times their factors, and a number."""

    factors: Mapping[str, float]
    shift: float

    def plus(self, other: _Sum, sign: float) -> _Sum:
        """The sum with `sign` times `other`."""
        names = {**self.factors, **other.factors}
        found = {n: self.factors.get(n, 0.0) + sign * other.factors.get(n, 0.0) for n in names}
        return _Sum(found, self.shift + sign * other.shift)

    def times(self, number: float) -> _Sum:
        """Each times `number`."""
        return _Sum({name: number * factor for name, factor in self.factors.items()}, number * self.shift)


@dataclass(frozen=True)
class _Atom:
    """A sum that is at most zero."""

    line: int
    sum: _Sum


_Dnf = list[tuple[_Atom, ...]]


def _tokens(text: str) -> Iterator[tuple[int, str]]:
    line = 1
    for match in _TOKEN.finditer(text):
        if match.lastgroup == "line":
            line += 1
        elif match.lastgroup == "odd":
            raise _Fault(line, f"unexpected character {match.group()!r}")
        elif match.lastgroup == "word":
            yield line, match.group()


def _forms(tokens: Iterable[tuple[int, str]]) -> Iterator[_Form]:
    """The lists at the top of a text."""
    open_: list[tuple[int, list[_Form]]] = []
    for line, token in tokens:
        if token == "(":
            open_.append((line, []))
            continue
        if token == ")":
            if not open_:
                raise _Fault(line, "a ) without a ( before it")
            start, parts = open_.pop()
            form = _Form(start, "", tuple(parts))
        else:
            form = _Form(line, token)
        if open_:
            open_[-1][1].append(form)
        elif form.word:
            raise _Fault(line, f"expected a list such as (assert ...), got {form}")
        else:
            yield form
    if open_:
        raise _Fault(open_[-1][0], "the ( here is never closed")


def _normal(forms: Sequence[_Form]) -> Property:
    declared: dict[str, int] = {}
    asserted: list[_Form] = []
    for form in forms:
        if form.head in ("declare-const", "declare-fun"):
            name = _declared(form)
            if name in declared:
                raise _Fault(form.line, f"{name} is declared twice, first in line {declared[name]}")
            declared[name] = form.line
        elif form.head == "assert":
            if len(form.parts) != 2:
                raise _Fault(form.line, f"expected (assert formula), got {form}")
            asserted.append(form.parts[1])
        elif form.head in ("vnnlib-version", "declare-network"):
            raise _Fault(form.line, f"expected VNN-LIB 1.0, got {form} of VNN-LIB 2.0; convert the file")
        elif form.head != "set-logic":
            raise _Fault(form.line, f"expected declare-const, declare-fun or assert, got {form}")
    inputs, outputs = (_count(declared, letter) for letter in "XY")
    alternatives = [_formula(form, declared) for form in asserted]
    common = [atom for dnf in alternatives if len(dnf) == 1 for atom in dnf[0]]
    choices = [dnf for dnf in alternatives if len(dnf) != 1]
    if math.prod(map(len, choices)) > _MOST:
        raise _Fault(1, f"expected at most {_MOST:,} alternatives, got {math.prod(map(len, choices)):,}")
    return Property(inputs, outputs, _cases(common, choices, inputs, outputs))


def _declared(form: _Form) -> str:
    """The name in (declare-const X_0 Real) or (declare-fun X_0 () Real)."""
    words = [part.word for part in form.parts]
    shape = ["declare-const", "", "Real"] if words[0] == "declare-const" else ["declare-fun", "", "", "Real"]
    fits = len(words) == len(shape) and words[0] == shape[0] and words[-1] == "Real"
    if not fits or (len(words) == 4 and (words[2] or form.parts[2].parts)):
        raise _Fault(form.line, f"expected (declare-const X_0 Real), got {form}")
    if not _VARIABLE.fullmatch(words[1]):
        raise _Fault(form.line, f"expected an input X_0, X_1, ... or an output Y_0, Y_1, ..., got {words[1]}")
    return words[1]


def _count(declared: Mapping[str, int], letter: str) -> int:
    """How many variables of `letter` there are; they are numbered from 0 without a gap."""
    found = sorted(int(name[2:]) for name in declared if name[0] == letter)
    if not found:
        raise _Fault(1, f"expected {letter}_0 to be declared, found no {letter}")
    if found != list(range(len(found))):
        missing = min(set(range(len(found))) - set(found), default=0)
        raise _Fault(1, f"expected {letter}_0 to {letter}_{found[-1]}, but {letter}_{missing} is not declared")
    return len(found)


def _formula(form: _Form, declared: Mapping[str, int]) -> _Dnf:
    """The alternatives of a formula, each a list of atoms that must all hold."""
    parts = form.parts[1:]
    if form.head == "or":
        return [atoms for part in parts for atoms in _formula(part, declared)]
    if form.head == "and":
        each = [_formula(part, declared) for part in parts]
        if math.prod(map(len, each)) > _MOST:
            raise _Fault(form.line, f"expected at most {_MOST:,} alternatives, got {math.prod(map(len, each)):,}")
        return [tuple(atom for atoms in chosen for atom in atoms) for chosen in product(*each)]
    if form.head in ("<=", ">=") and len(parts) == 2:
        left, right = (_term(part, declared) for part in parts)
        return [(_Atom(form.line, left.plus(right, -1.0) if form.head == "<=" else right.plus(left, -1.0)),)]
    raise _Fault(form.line, f"expected and, or, (<= a b) or (>= a b), got {form}")


def _term(form: _Form, declared: Mapping[str, int]) -> _Sum:
    """A linear term."""
    if form.word:
        if _NUMBER.fullmatch(form.word):
            if not math.isfinite(float(form.word)):
                raise _Fault(form.line, f"expected a number of float64, got {form}")
            return _Sum({}, float(form.word))
        if form.word in declared:
            return _Sum({form.word: 1.0}, 0.0)
        raise _Fault(form.line, f"expected a number or a declared variable, got {form}")
    parts = [_term(part, declared) for part in form.parts[1:]]
    if parts and form.head == "+":
        return _added(parts, 1.0)
    if parts and form.head == "-":
        return parts[0].times(-1.0) if len(parts) == 1 else _added(parts, -1.0)
    if parts and form.head == "*":
        found = _Sum({}, 1.0)
        for part in parts:
            if found.factors and part.factors:
                raise _Fault(form.line, f"expected a linear term, got a product of variables: {form}")
            found = part.times(found.shift) if part.factors else found.times(part.shift)
        return found
    raise _Fault(form.line, f"expected a number, a variable, or a sum, difference or multiple of these, got {form}")


def _added(parts: Sequence[_Sum], sign: float) -> _Sum:
    found = parts[0]
    for part in parts[1:]:
        found = found.plus(part, sign)
    return found


def _cases(common: Sequence[_Atom], choices: Sequence[_Dnf], inputs: int, outputs: int) -> tuple[Case, ...]:
    """The alternatives that are not empty, those of one box together."""
    start = ([-math.inf] * inputs, [math.inf] * inputs)
    box = _cut(start, common)
    found: dict[tuple[tuple[float, ...], tuple[float, ...]], list[Conjunction]] = {}
    for chosen in product(*choices):
        atoms = [atom for some in chosen for atom in some]
        low, high = _cut(box, atoms)
        for ends, side, word in ((low, -math.inf, "lower"), (high, math.inf, "upper")):
            if side in ends:
                raise _Fault(1, f"expected bounds on every input, but X_{ends.index(side)} has no {word} one")
        if all(a <= b for a, b in zip(low, high, strict=True)):
            found.setdefault((tuple(low), tuple(high)), []).append(_conjunction([*common, *atoms], outputs))
    return tuple(
        Case(torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64), tuple(unsafe))
        for (low, high), unsafe in found.items()
    )


def _cut(box: tuple[list[float], list[float]], atoms: Sequence[_Atom]) -> tuple[list[float], list[float]]:
    """`box` cut with those `atoms` that speak of inputs: each of one, by itself."""
    low, high = (list(ends) for ends in box)
    for atom in atoms:
        names = [name for name, factor in atom.sum.factors.items() if name[0] == "X" and factor]
        if not names:
            continue
        if len(names) > 1 or any(factor and name[0] == "Y" for name, factor in atom.sum.factors.items()):
            raise _Fault(
                atom.line, f"expected a bound on one input, got a constraint on {', '.join(names)} and others"
            )
        at, factor = int(names[0][2:]), atom.sum.factors[names[0]]
        end = -atom.sum.shift / factor + 0.0  # of -0.0 too
        if factor > 0:
            high[at] = min(high[at], end)
        else:
            low[at] = max(low[at], end)
    return low, high


def _conjunction(atoms: Sequence[_Atom], outputs: int) -> Conjunction:
    """Those `atoms` that speak of outputs or of numbers alone; one that always holds where there are none."""
    said = [atom.sum for atom in atoms if not any(f and name[0] == "X" for name, f in atom.sum.factors.items())]
    a, b = torch.zeros(max(1, len(said)), outputs, dtype=torch.float64), [s.shift for s in said] or [-1.0]
    for row, sum_ in enumerate(said):
        for name, factor in sum_.factors.items():
            if name[0] == "Y":
                a[row, int(name[2:])] = factor
    return Conjunction(a, torch.tensor(b, dtype=torch.float64))
