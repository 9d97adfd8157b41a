"""Attacks compared: the same rows, the same judge, the same passes."""

from sparring.comparison.compare import Comparison, compare
from sparring.comparison.entry import Entry
from sparring.comparison.trial import Trial, trial

__all__ = ["Comparison", "Entry", "Trial", "compare", "trial"]
