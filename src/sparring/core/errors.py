"""What can go wrong, with the exit code the command line ends with.

An error says what was expected, what came, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SparringError(Exception):
    """The root of every error raised on purpose here."""

    exit_code = 4


class UsageError(SparringError):
    """A name, an option or a value that cannot be meant."""

    exit_code = 2


class DataError(SparringError):
    """Images or labels that are missing, damaged, or not what they claim to be."""

    exit_code = 2


class ModelError(SparringError):
    """A model that fails, or that answers what no classifier may answer."""

    exit_code = 4


class AttackError(SparringError):
    """An attack that cannot run on this model or breaks its contract."""

    exit_code = 4


class GateError(SparringError):
    """The run finished, and its figure is below the bar that was asked for."""

    exit_code = 1


class IncompleteError(SparringError):
    """The run stopped before its end; the same command resumes it."""

    exit_code = 3


def unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is not in `known`, with the nearest one that is."""
    names = sorted(known)
    swapped = [other for other in names if sorted(other) == sorted(name)]  # the commonest slip
    near = swapped or get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
    return UsageError(f"unknown {kind} {name!r}; {hint}")
