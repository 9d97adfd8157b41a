"""What is tried, and on which rows: all rows meet the cheap attacks, and the nearest survivors ever more.

Openings meet every row that holds. Then come rounds, each of about the same work: half as many rows, with
twice as many digs each. Rows are ranked by how close they came, over the whole audit and between rounds
only: a row's fate depends on neither its batch nor its shard. Where a round still breaks many of its rows,
the next one takes as many again before it halves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from sparring.attacks.sprint import Sprint
from sparring.attacks.square import Square
from sparring.auditing.hunt import BOUNDARY, BOUNDARY_L1, TRIES, WALKS, WIDE, Front, Hunt, Setting, dig
from sparring.core.attack import Attack
from sparring.core.errors import unknown

_SALT = 100_000  # noise apart for every stage


@dataclass(frozen=True)
class Profile:
    """How much to try."""

    name: str
    opening: int  # steps of the first sprint
    aimed: int  # sprints towards the likeliest wrong classes
    work: float  # digs for each row that the openings leave
    deepest: int  # digs that one row gets in one round, at most

    version = 1


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("quick", opening=8, aimed=1, work=2, deepest=4),
        Profile("standard", opening=12, aimed=4, work=7.5, deepest=128),
        Profile("deep", opening=20, aimed=5, work=60, deepest=1024),
    )
}
FULL = 256  # digs in a round: from there on a row has two on each chain, which finds more than chains side by side
STILL_FALLING = 1 / 8  # of a round's rows: then the next round takes as many
WORTH = 1 / 8  # of a trial's rows: then all rows meet what was tried
TRIED = 16  # rows in a trial, at least; else a sixteenth of those that hold
FEW = 64  # rows; of fewer, each may cost more


def profile(name: str) -> Profile:
    """The profile called `name`."""
    if name not in PROFILES:
        raise unknown("profile", name, PROFILES)
    return PROFILES[name]


@dataclass(frozen=True)
class Stage:
    """One thing to try, on the rows that came closest."""

    number: int
    name: str
    rows: int  # how many of those that hold
    attack: Attack | None = None  # None: dig
    aim: int | None = None  # the place of the wrong class to aim at, by likelihood
    digs: int = 0
    tried: int = 0  # tries of gradients in the rounds before
    wide: bool = False  # are these tries to begin in a wider ball,
    walks: bool = False  # and to walk along the boundary?
    skip: int | None = None  # the stage whose rows are spared
    trial: bool = False  # on a few rows first: if it breaks few of them, the others are spared it

    def hunt(self, setting: Setting, front: Front) -> Hunt:
        """Try it on a front."""
        salt = self.number * _SALT
        if self.attack is None:
            plan = WALKS if self.walks else WIDE if self.wide else TRIES
            tries = [plan[number % len(plan)] for number in range(self.tried, self.tried + self.tries)]
            return dig(setting, front, self.chains, self.digs // self.chains, tries, salt)
        hunt = Hunt(setting, front)
        at = hunt.open
        hunt.play(self.attack, salt, at, None if self.aim is None else hunt.targets(at, self.aim))
        return hunt

    @property
    def tries(self) -> int:
        """Tries of gradients that a row gets: the longer these are, the fewer."""
        return max(1, self.digs * 3 // (24 if self.walks else 16 if self.wide else 8))

    @property
    def chains(self) -> int:
        """Chains of digs that a row gets side by side; a model is asked about few rows at about the cost of many."""
        return max(1, self.digs // (1 if self.rows * self.digs < FULL else 2))


def openings(plan: Profile, norm: str, classes: int, gradients: bool) -> list[Stage]:
    """What every row meets, or at least those of a trial; `rows` and `number` are still to be filled in."""
    if not gradients:
        return [Stage(0, "square", 0, Square(steps=50 * plan.opening, p=0.3))]
    aims = range(min(plan.aimed, classes - 1))
    if norm == "linf":
        return [Stage(0, "sprint", 0, Sprint(plan.opening, loss="log_odds"))]
    # In L2 and L1 gradients often vanish inside the ball, and return beyond it.
    stages = [Stage(0, "sprint", 0, Sprint(plan.opening, loss="log_odds", wide=3.0))]
    walk = BOUNDARY_L1 if norm == "l1" else BOUNDARY
    stages += [Stage(0, f"boundary {aim + 1}", 0, walk, aim, trial=True) for aim in aims]
    return stages


@dataclass
class Cascade:
    """Which stage comes next; it knows only how many rows held before and after each."""

    plan: Profile
    norm: str
    classes: int
    gradients: bool
    stage: Stage | None = None
    first: int = 0  # rows that the openings left
    spent: int = 0  # digs so far
    tried: int = 0  # and tries of gradients, of one row
    walks: bool = False  # was the boundary worth walking along?

    def __post_init__(self) -> None:
        """Lay out the openings."""
        self.ahead = openings(self.plan, self.norm, self.classes, self.gradients)

    def next(self, held: int, fell: int) -> Stage | None:
        """The stage after the last one, which broke `fell` rows and left `held`; None at the end."""
        last = self.stage
        number = 1 if last is None else last.number + 1
        if not held:
            self.stage = None
        elif last is not None and last.trial and fell > max(1, WORTH * last.rows):
            self.walks = True
            self.stage = replace(last, number=number, rows=held, trial=False, skip=last.number)
        elif last is not None and last.trial:  # nor would its like be worth it
            self.ahead = [stage for stage in self.ahead if not stage.trial]
            self.stage = self._round(number, held, fell)
        elif self.ahead:
            stage = self.ahead.pop(0)
            few = min(held, max(TRIED, held // 16))
            self.stage = replace(stage, number=number, rows=few if stage.trial else held)
        else:
            self.stage = self._round(number, held, fell)
        return self.stage

    def _round(self, number: int, held: int, fell: int) -> Stage | None:
        last = self.stage
        if last is None or not last.digs:
            rows, digs, self.first = held, 1, held
        elif fell > STILL_FALLING * last.rows:
            rows, digs = last.rows, last.digs
        else:
            rows, digs = (last.rows + 1) // 2, 2 * last.digs
        rows = min(rows, held)
        self.spent += rows * digs
        if digs > self.plan.deepest or self.spent > self.plan.work * max(self.first, FEW):
            return None
        wide = self.norm != "linf"
        stage = Stage(number, f"round of {digs}", rows, digs=digs, tried=self.tried, wide=wide, walks=self.walks)
        self.tried += stage.tries
        return stage


def nearest(gap: Tensor, ids: Tensor, count: int) -> Tensor:
    """(count,) the places of the largest gaps, in the order of `ids`; of equal gaps the lowest ids."""
    by_id = ids.argsort()
    chosen = by_id[gap[by_id].argsort(descending=True, stable=True)[:count]]
    return chosen[ids[chosen].argsort()]
