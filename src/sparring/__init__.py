"""Train an image classifier, attack it, harden it, and say honestly how robust it now is."""

import os

__version__ = "0.1.0"

# Threads that spin while they wait make two processes on the same cores up to thirty times slower. Read when
# torch is loaded; whoever sets one of these, or loads torch first, keeps what they have. See docs/decisions/003.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from sparring.api import attack, train
from sparring.auditing.audit import Audit, audit
from sparring.comparison import Comparison, compare
from sparring.core.errors import SparringError
from sparring.core.judge import Judge
from sparring.core.model import Access
from sparring.core.threat import L0, L1, L2, Linf, Unbounded
from sparring.core.verdict import Verdict
from sparring.data import load
from sparring.defending import Defended, defend
from sparring.engine.outcome import Outcome
from sparring.fitted.paste import Paste
from sparring.fitted.patch import AdversarialPatch, fit_patch
from sparring.fitted.universal import Universal, fit_universal
from sparring.models.bpda import bpda
from sparring.models.checkpoint import open_checkpoint
from sparring.models.eot import EOT
from sparring.models.wrap import wrap
from sparring.transferability import Transfer, transfer

__all__ = [
    "EOT",
    "L0",
    "L1",
    "L2",
    "Access",
    "AdversarialPatch",
    "Audit",
    "Comparison",
    "Defended",
    "Judge",
    "Linf",
    "Outcome",
    "Paste",
    "SparringError",
    "Transfer",
    "Unbounded",
    "Universal",
    "Verdict",
    "attack",
    "audit",
    "bpda",
    "compare",
    "defend",
    "fit_patch",
    "fit_universal",
    "load",
    "open_checkpoint",
    "train",
    "transfer",
    "wrap",
]
