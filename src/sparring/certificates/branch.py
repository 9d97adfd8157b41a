"""Branch and bound: what bounds alone leave open is split on the signs of ReLU arguments until it is decided.

`decide` answers questions about a graph, `certify` the one that is asked of a classifier; see `search` for how.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparring.certificates.crown import margins
from sparring.certificates.graph import Graph, Trace, trace
from sparring.certificates.ibp import Bounds
from sparring.certificates.peeling import peel
from sparring.certificates.region import Region, region
from sparring.certificates.search import BROKEN, OPEN, PROVED, Confirm, Decision, Effort, Question, Search, Tell
from sparring.core.batch import Rows
from sparring.core.errors import UsageError
from sparring.core.model import Access, Model
from sparring.core.threat import Threat
from sparring.engine.preflight import check_images, check_labels

__all__ = [
    "BROKEN",
    "OPEN",
    "PROVED",
    "Certified",
    "Confirm",
    "Decision",
    "Effort",
    "Question",
    "Tell",
    "certify",
    "decide",
]


def decide(
    graph: Graph,
    region: Region,
    question: Question,
    *,
    deadline: float | None = None,
    known: Bounds | None = None,
    width: int = 64,
    confirm: Confirm | None = None,
    tell: Tell | None = None,
    home: Tensor | None = None,
    effort: Effort | None = None,
) -> Decision:
    """Prove or break the `question` of each row of `region` (n rows), until `deadline` by `time.monotonic()`.

    A row is proved when for every point some asked_s . logits + offset_s is above what the model may round away. It
    is broken by a point of the region where none is above zero in `graph`, if `confirm(points, rows)` (m,) agrees.
    `known` are bounds of the nodes that hold already. `home` (q,) gives each of q questions its row (n,); all of a
    row's must be proved, and one breaks it. `tell` hears of the decision after each batch of `width` subproblems.
    """
    rows = len(region.x)
    home = torch.arange(rows, device=region.x.device) if home is None else home
    if (
        question.asked.dim() != 3
        or question.asked.shape[:2] != question.offset.shape
        or question.asked.shape[2] != graph.classes
        or len(home) != len(question.asked)
    ):
        raise UsageError(
            f"expected asked (n, s, {graph.classes}) and offset (n, s) for {len(home)} questions, "
            f"got {tuple(question.asked.shape)} and {tuple(question.offset.shape)}"
        )
    with torch.no_grad():
        search = Search(graph, region, question, home, effort or Effort(), width, deadline, confirm, tell)
        return search.run(known)


@dataclass(frozen=True)
class Certified(Rows):
    """What became of each image."""

    certified: Tensor  # (n,) bool: no image of the threat model changes the label
    broken: Tensor  # (n,) bool: `worst` does
    lower: Tensor  # (n,) float64: proved of the least margin, less the model's own rounding
    worst: Tensor  # (n, c, h, w): a legal image: one that changes the label, else one to attack from
    nodes: Tensor  # (n,) int64: subproblems that were bounded
    seconds: float


def certify(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    deadline: float | None = None,
    traced: Trace | None = None,
    width: int = 64,
    tell: Tell | None = None,
    effort: Effort | None = None,
) -> Certified:
    """Prove or break that images `x` (n, c, h, w) keep their labels `y` (n,) in `threat` (linf or l2).

    It ends when all are decided, or at `deadline` by `time.monotonic()`. What is broken is so by the model itself.
    `traced` spares the trace of the model. The other options are those of `decide`; `tell` hears of legal images.
    """
    check_images(x, model.bounds)
    if threat.bounds != model.bounds:
        raise UsageError(f"expected a threat model with the model's bounds {model.bounds}, got {threat.bounds}")
    began = time.monotonic()
    graph = (traced or trace(model, x.shape[1:], x.device)).graph()
    check_labels(y, len(x), classes=graph.classes)
    peeled = peel(graph, region(threat, x))
    asked = margins(graph, y, peeled.region.low)
    rows, others = asked.shape[:2]

    def legal(points: Tensor, at: Tensor) -> Tensor:
        return threat.project(peeled.images(points, at).to(x.dtype), x[at])

    def confirm(points: Tensor, at: Tensor) -> Tensor:
        images = legal(points, at)
        return (model.query(images, Access.DECISION).labels != y[at]) & threat.contains(images, x[at])

    everyone = torch.arange(rows, device=y.device)

    def told(so_far: Decision) -> None:
        if tell is not None:
            tell(replace(so_far, point=legal(so_far.point, everyone)))

    found = decide(
        peeled.graph, peeled.region, Question(asked.flatten(0, 1).unsqueeze(1), asked.new_zeros(rows * others, 1)),
        home=everyone.repeat_interleave(others),
        deadline=deadline, width=width, confirm=confirm, tell=told if tell else None, effort=effort,
    )  # fmt: skip
    worst = legal(found.point, everyone)
    seconds = time.monotonic() - began
    return Certified(found.state == PROVED, found.state == BROKEN, found.lower, worst, found.nodes, seconds)
