"""What a run found, row by row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.core.batch import Rows
from sparring.core.threat import Threat


@dataclass(frozen=True)
class Outcome(Rows):
    """The rows of one run in the order they were given; `best` is as stored, and judged again from there."""

    sample: Tensor  # (n,) int64 sample ids
    clean: Tensor  # (n,) bool: wrong untouched, or already in the class to reach (its label, say): not attacked
    found: Tensor  # (n,) bool: an adversarial image was found and confirmed (the clean one included)
    moved: Tensor  # (n,) bool: found, but not confirmed: rounding, or the draws of a random model, decide there
    failed: Tensor  # (n,) bool: the model raised on the row or gave no finite logits; it is neither found nor held
    best: Tensor  # (n, c, h, w) the adversarial image; where none was found, the last point of the first try
    distance: Tensor  # (n,) float64 from the clean image, in the norm of the threat model
    clean_label: Tensor  # (n,) int64: what the model says of the untouched image
    clean_confidence: Tensor  # (n,) float64: and with which probability
    label: Tensor  # (n,) int64: what the model says of `best`
    confidence: Tensor  # (n,) float64: and with which probability; NaN from a model that gives labels only
    forward: Tensor  # (n,) int64 forward passes spent on the row
    backward: Tensor  # (n,) int64 backward passes

    @property
    def success_rate(self) -> float:
        """The share of the rows that held when untouched and fell to the attack; NaN if none held."""
        held = ~self.clean & ~self.failed
        return ((self.found & held).sum() / held.sum()).item()

    @property
    def robust_accuracy(self) -> float:
        """The share of all rows that held: an upper bound on the truth, since another attack may do better."""
        return 1.0 - self.found.double().mean().item()


class Ledger:
    """The best point and the passes of every row while a run goes on."""

    def __init__(self, threat: Threat, x: Tensor, label: Tensor, score: Tensor) -> None:
        n = len(x)
        self._threat, self._x = threat, x
        self.best, self.label, self.score = x.clone(), label.clone(), score.clone()
        self.distance = torch.full((n,), torch.inf, dtype=torch.float64, device=x.device)
        self._rank = torch.full((n,), torch.iinfo(torch.int64).max, device=x.device)
        self.forward = torch.zeros(n, dtype=torch.int64, device=x.device)
        self.backward = torch.zeros_like(self.forward)
        self.gap = torch.full((n,), -torch.inf, device=x.device)  # of `best` where `approach` was told
        self.failed = torch.zeros(n, dtype=torch.bool, device=x.device)
        self.reasons: dict[int, str] = {}  # why the failed rows failed
        self.unsettled: set[int] = set()  # rows that a stop left without their last try

    @property
    def found(self) -> Tensor:
        """(n,) bool: has an adversarial image been entered?"""
        return self.distance < torch.inf

    def enter(
        self, rows: Tensor, rank: Tensor, points: Tensor, *, nearest: bool, depth: Tensor | None = None
    ) -> None:
        """Enter adversarial `points` (m, ...); of a row's several, the nearest or that of the lowest rank stays.

        With `depth` (m,) of points that fool a random model, the deepest of the lowest rank stays, or the nearest
        of the deepest.
        """
        distance = self._threat.distance(points, self._x[rows])
        for tier in sorted(set(rank.tolist())):  # a row may sit on several seats, but has only one of each rank
            at = (rank == tier).nonzero().squeeze(1)
            row, far = rows[at], distance[at]
            first = (tier < self._rank[row]) | ~self.found[row]
            nearer = (far < self.distance[row]) | ((far == self.distance[row]) & first)
            better = nearer if nearest else first
            if depth is not None:
                deep, known = depth[at], self.gap[row]
                if nearest:
                    better = ~self.found[row] | (deep > known) | ((deep == known) & nearer)
                else:
                    better = first | ((tier == self._rank[row]) & (deep > known))
                self.gap[row[better]] = deep[better]
            row, at = row[better], at[better]
            self.best[row], self.distance[row], self._rank[row] = points[at], distance[at], tier

    def owns(self, rows: Tensor, rank: Tensor) -> Tensor:
        """(m,) bool: has the try of this rank entered the point that stands?"""
        return self.found[rows] & (self._rank[rows] == rank)

    def give_up(self, rows: Tensor, rank: Tensor, points: Tensor, label: Tensor, score: Tensor) -> None:
        """Keep the last point of a row's first try and what was said of it, while nothing better is known."""
        keep = (rank == 0) & ~self.found[rows]
        row = rows[keep]
        self.best[row], self.label[row], self.score[row] = points[keep], label[keep], score[keep]

    def approach(self, rows: Tensor, rank: Tensor, points: Tensor, gap: Tensor) -> None:
        """Keep a row's closest point while nothing adversarial is known; of equals that of the lowest rank."""
        for tier in sorted(set(rank.tolist())):
            at = ((rank == tier) & ~self.found[rows]).nonzero().squeeze(1)
            row, value = rows[at], gap[at]
            better = (value > self.gap[row]) | ((value == self.gap[row]) & (tier < self._rank[row]))
            row, at = row[better], at[better]
            self.best[row], self.gap[row], self._rank[row] = points[at], gap[at], tier

    def fail(self, reasons: dict[int, str]) -> None:
        """The model has no answer for these rows."""
        self.failed[torch.tensor(list(reasons), dtype=torch.int64, device=self.failed.device)] = True
        self.reasons |= reasons

    def charge(self, rows: Tensor, forward: list[int], backward: list[int]) -> None:
        """Add the passes of finished cases to their rows (m,)."""
        self.forward.index_add_(0, rows, torch.tensor(forward, dtype=torch.int64, device=rows.device))
        self.backward.index_add_(0, rows, torch.tensor(backward, dtype=torch.int64, device=rows.device))
