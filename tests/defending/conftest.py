"""Less of everything, so that a whole analysis takes seconds."""

from __future__ import annotations

import pytest

import sparring
from sparring.auditing import audit, curve
from sparring.data.images import Dataset
from sparring.defending import cost, measure


@pytest.fixture(scope="package", autouse=True)
def little():
    """Few rows for what is looked at beside the verdicts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curve, "ROWS", 4)
        patch.setattr(curve, "GRID", (0.5, 1.0))
        patch.setattr(audit, "CHECKED", 16)
        patch.setattr(measure, "ASKED", 4)
        patch.setattr(measure, "QUERIES", 100)
        patch.setattr(cost, "ROUNDS", 2)
        yield


@pytest.fixture(scope="session")
def digits_set() -> Dataset:
    """The embedded digits."""
    return sparring.load("digits")
