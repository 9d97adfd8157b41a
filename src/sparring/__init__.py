"""Train an image classifier, attack it, harden it, and say honestly how robust it now is."""

__version__ = "0.1.0"

from sparring.api import attack, train, wrap
from sparring.core.errors import SparringError
from sparring.core.judge import Judge
from sparring.core.model import Access
from sparring.core.threat import L0, L1, L2, Linf, Unbounded
from sparring.data import load
from sparring.engine.outcome import Outcome
from sparring.models.checkpoint import open_checkpoint

__all__ = [
    "L0",
    "L1",
    "L2",
    "Access",
    "Judge",
    "Linf",
    "Outcome",
    "SparringError",
    "Unbounded",
    "attack",
    "load",
    "open_checkpoint",
    "train",
    "wrap",
]
