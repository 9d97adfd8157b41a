"""What is known of every row of an audit, as its shards tell it."""

from __future__ import annotations

from collections import Counter, defaultdict

import torch
from torch import Tensor

from sparring.auditing.evidence import Evidence, Shard
from sparring.core.verdict import Verdict

STATES = ("waiting", "held", "broken", "misclassified", "certified", "error")
WAITING, HELD, BROKEN, MISCLASSIFIED, CERTIFIED, ERROR = range(len(STATES))
_VERDICTS = {
    WAITING: Verdict.UNDECIDED,
    HELD: Verdict.UNDECIDED,
    BROKEN: Verdict.BROKEN,
    MISCLASSIFIED: Verdict.MISCLASSIFIED,
    CERTIFIED: Verdict.CERTIFIED,
    ERROR: Verdict.ERROR,
}


class Standing:
    """Columns with an entry a row, in the order of the images; `at` finds the rows of ids."""

    def __init__(self, ids: Tensor, y: Tensor) -> None:
        self.ids, self.y = ids, y
        n = len(ids)
        self._order = self.ids.argsort()
        self._sorted = self.ids[self._order]
        self.state = torch.zeros(n, dtype=torch.int8)
        self.gap = torch.full((n,), -torch.inf)
        self.forward, self.backward = torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
        self.stage = torch.full((n,), -1)  # of the last word
        self.work, self.place = torch.full((n,), -1), torch.zeros(n, dtype=torch.int64)  # of the closest point
        self.image = torch.full((n,), -1)  # place of the adversarial image in its shard
        self.shard = torch.full((n,), -1)
        self.clean_label, self.label = torch.full((n,), -1), torch.full((n,), -1)
        self.clean_confidence = torch.full((n,), torch.nan, dtype=torch.float64)
        self.confidence, self.distance = self.clean_confidence.clone(), self.clean_confidence.clone()
        self.eight_bit = torch.zeros(n, dtype=torch.bool)
        self.reach = torch.full((n,), torch.inf, dtype=torch.float64)  # the smallest distance found
        self.near, self.near_image = torch.full((n,), -1), torch.full((n,), -1)  # its shard, and its place there
        self.measured = torch.full((n,), -1)  # stage of the last word on distances
        self.bound = torch.full((n,), -torch.inf, dtype=torch.float64)  # of the weakest margin, less its guard
        self.guard = torch.full((n,), torch.nan, dtype=torch.float64)  # what was taken off that bound
        self.weighed = torch.full((n,), -1)  # stage of the last word of a proof
        self.proof = torch.full((n,), -1)  # the shard that holds the proof of a certified row
        self.radius = torch.full((n,), torch.nan, dtype=torch.float64)  # the largest at which the row is proved
        self.moved = torch.zeros(n, dtype=torch.bool)
        self.names: list[str] = []  # of shards, by number
        self.stages: dict[int, str] = {}  # what was tried, by stage
        self.reasons: dict[int, str] = {}  # by place
        self.tried: Counter[int] = Counter()  # rows that each stage settled
        self.costs: Counter[tuple[int, str]] = Counter()  # by stage: forward, backward
        self.seconds: defaultdict[int, float] = defaultdict(float)  # by stage
        self.fell: Counter[int] = Counter()  # rows that each stage broke
        self.proved: Counter[int] = Counter()  # rows that each stage of proofs certified
        self.bought: list[tuple[float, int, int]] = []  # after each shard: seconds so far, rows proved, rows lost

    @classmethod
    def of(cls, evidence: Evidence) -> Standing:
        """What the shards on disk say of the rows that they name."""
        ids, truth = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
        for _, shard in evidence.shards(stage=0):
            if shard.complete:
                ids.append(torch.tensor(shard.ids, dtype=torch.int64))
                truth.append(torch.tensor(shard.truth, dtype=torch.int64))
        order = torch.cat(ids).argsort()
        standing = cls(torch.cat(ids)[order], torch.cat(truth)[order])
        for name, shard in evidence.shards():  # one at a time: as Python numbers they are large
            standing.apply(name, shard)
        return standing

    def at(self, ids: Tensor) -> Tensor:
        """The places of rows with these ids."""
        return self._order[torch.searchsorted(self._sorted, ids)]

    @property
    def held(self) -> Tensor:
        """(m,) places of the rows that hold so far."""
        return (self.state == HELD).nonzero().squeeze(1)

    def apply(self, name: str, shard: Shard) -> None:
        """Take a shard's word."""
        self._take(name, shard)
        rows = torch.bincount(self.state.long(), minlength=len(STATES)).tolist()
        self.bought.append((sum(self.seconds.values()), rows[CERTIFIED], rows[BROKEN] + rows[MISCLASSIFIED]))

    def _take(self, name: str, shard: Shard) -> None:
        at = self.at(torch.tensor(shard.ids, dtype=torch.int64))
        self.forward[at] += torch.tensor(shard.forward, dtype=torch.int64)
        self.backward[at] += torch.tensor(shard.backward, dtype=torch.int64)
        self.costs[shard.stage, "forward"] += sum(shard.forward)
        self.costs[shard.stage, "backward"] += sum(shard.backward)
        self.seconds[shard.stage] += shard.seconds
        if not shard.complete:
            return
        number = len(self.names)
        self.names.append(name)
        self.stages[shard.stage] = shard.name
        state = torch.tensor([STATES.index(word) for word in shard.state], dtype=torch.int8)
        self.tried[shard.stage] += len(at)
        if shard.bound is not None or shard.radius is not None:
            self._weigh(at, state, shard, number)
            return
        if shard.nearer is not None:
            self._come_nearer(at, state, shard, number)
            return
        self.state[at], self.stage[at], self.shard[at] = state, shard.stage, number
        self.gap[at] = torch.tensor(shard.gap, dtype=torch.float32)
        self.fell[shard.stage] += int((state == BROKEN).sum())
        holding = at[state == HELD]
        if shard.stage:
            self.work[holding], self.place[holding] = number, torch.arange(len(holding))
        self.moved[self.at(torch.tensor(shard.moved, dtype=torch.int64))] = True
        self.reasons |= {int(self.at(torch.tensor([int(i)]))): why for i, why in shard.errors.items()}
        self._told(at if shard.stage == 0 else at[state == BROKEN], shard)

    def _told(self, at: Tensor, shard: Shard) -> None:
        """What the model said: of clean images in stage 0, later of the adversarial ones."""
        label = torch.tensor(shard.label, dtype=torch.int64)
        score = torch.tensor([torch.nan if c is None else c for c in shard.confidence], dtype=torch.float64)
        if shard.stage == 0:
            self.clean_label[at], self.clean_confidence[at] = label, score
            self.reach[at[self.state[at] == MISCLASSIFIED]] = 0.0
            return
        self.label[at], self.confidence[at] = label, score
        self.distance[at] = torch.tensor([torch.nan if d is None else d for d in shard.distance], dtype=torch.float64)
        self.eight_bit[at] = torch.tensor(shard.eight_bit, dtype=torch.bool)
        self.image[at] = torch.arange(len(at))
        self.reach[at], self.near[at], self.near_image[at] = self.distance[at], self.shard[at], self.image[at]

    def _weigh(self, at: Tensor, state: Tensor, shard: Shard, number: int) -> None:
        """Take the word of a proof: it moves rows that held, to certified or to broken by an image that it found."""
        self.weighed[at] = shard.stage
        if shard.radius is not None:
            self.radius[at] = torch.tensor(shard.radius, dtype=torch.float64)
            return
        bound = torch.tensor(shard.bound, dtype=torch.float64)
        guard = torch.tensor(shard.guard, dtype=torch.float64)
        better = bound > self.bound[at]
        self.bound[at[better]], self.guard[at[better]] = bound[better], guard[better]
        proved = at[(state == CERTIFIED) & (self.state[at] == HELD)]
        self.state[proved], self.stage[proved], self.proof[proved] = CERTIFIED, shard.stage, number
        self.proved[shard.stage] += len(proved)
        fell = at[state == BROKEN]
        self.state[fell], self.stage[fell], self.shard[fell], self.gap[fell] = BROKEN, shard.stage, number, 0.0
        self.fell[shard.stage] += len(fell)
        self._told(fell, shard)

    def _come_nearer(self, at: Tensor, state: Tensor, shard: Shard, number: int) -> None:
        """Take a word on distances: it moves no verdict but that of a row that held and is broken by its image."""
        self.measured[at] = shard.stage
        near, place = self.at(torch.tensor(shard.nearer, dtype=torch.int64)), torch.arange(len(shard.nearer or ()))
        self.reach[near] = torch.tensor(shard.distance, dtype=torch.float64)
        self.near[near], self.near_image[near] = number, place
        fell = torch.zeros_like(self.moved)
        fell[at] = (state == BROKEN) & (self.state[at] != BROKEN)
        fresh, place = near[fell[near]], place[fell[near]]
        self.fell[shard.stage] += len(fresh)
        self.state[fresh], self.stage[fresh], self.gap[fresh] = BROKEN, shard.stage, 0.0
        self.shard[fresh], self.image[fresh], self.distance[fresh] = number, place, self.reach[fresh]
        self.label[fresh] = torch.tensor(shard.label, dtype=torch.int64)[place]
        score = [torch.nan if c is None else c for c in shard.confidence]
        self.confidence[fresh] = torch.tensor(score, dtype=torch.float64)[place]
        self.eight_bit[fresh] = torch.tensor(shard.eight_bit, dtype=torch.bool)[place]

    def closest(self, at: Tensor, x: Tensor, evidence: Evidence) -> Tensor:
        """(m, c, h, w) where the rows at `at` (m,) with clean images `x` came closest."""
        best = x.clone()
        for number in torch.unique(self.work[at]).tolist():
            mine = self.work[at] == number
            if number >= 0:
                best[mine] = evidence.closest(self.names[number], self.place[at[mine]])
        return best

    def nearest(self, at: Tensor, x: Tensor, evidence: Evidence) -> Tensor:
        """(m, c, h, w) the nearest adversarial images of the rows at `at` (m,), or their clean images `x`."""
        found = self.images(evidence, at[self.near[at] >= 0], nearest=True)
        return torch.stack([found.get(row, clean) for row, clean in zip(self.ids[at].tolist(), x, strict=True)])

    def images(self, evidence: Evidence, at: Tensor, *, nearest: bool) -> dict[int, Tensor]:
        """By id the stored images (c, h, w) of rows `at` (m,): the nearest, or those that decided the verdict."""
        shard, place = (self.near, self.near_image) if nearest else (self.shard, self.image)
        found: dict[int, Tensor] = {}
        for number in torch.unique(shard[at]).tolist():
            mine = at[shard[at] == number]
            exact = evidence.images(self.names[number])["exact"][place[mine]]
            found |= dict(zip(self.ids[mine].tolist(), exact, strict=True))
        return found

    def stale(self) -> set[str]:
        """Shards whose closest points are all superseded."""
        needed = set(torch.unique(self.work[self.held]).tolist())
        return {name for number, name in enumerate(self.names) if number not in needed}

    @property
    def verdicts(self) -> list[Verdict]:
        """The verdict of every row."""
        return [_VERDICTS[state] for state in self.state.tolist()]

    @property
    def counts(self) -> dict[str, int]:
        """Rows of each verdict."""
        tally = torch.bincount(self.state.long(), minlength=len(STATES)).tolist()
        counts = {str(verdict): 0 for verdict in Verdict}
        for state, rows in enumerate(tally):
            counts[str(_VERDICTS[state])] += rows
        return counts
