"""What is tried, and on which rows: all rows meet the cheap attacks, and the nearest survivors ever more.

Openings meet every row that holds. Then come rounds, each of about the same work: half as many rows, with
twice as many digs each. Rows are ranked by how close they came, over the whole audit and between rounds
only: a row's fate depends on neither its batch nor its shard. Where a round still breaks many of its rows,
the next one takes as many again before it halves.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparring.attacks.sprint import Sprint
from sparring.attacks.square import Square
from sparring.auditing.hunt import WIDTH, Front, Hunt, Setting, dig, tries
from sparring.core.attack import Attack
from sparring.core.errors import unknown

_SALT = 100_000  # noise apart for every stage


@dataclass(frozen=True)
class Profile:
    """How much to try."""

    name: str
    opening: int  # steps of the first sprint
    work: float  # digs for each row that the openings leave
    deepest: int  # digs that one row gets in one round, at most

    version = 1


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("quick", opening=8, work=2, deepest=4),
        Profile("standard", opening=12, work=7.5, deepest=128),
        Profile("deep", opening=20, work=60, deepest=1024),
    )
}
FULL = 256  # digs in a round: from there on a row has two on each chain, which finds more than chains side by side
STILL_FALLING = 1 / 8  # of a round's rows: then the next round takes as many
FEW = 64  # rows; of fewer, each may cost more


def profile(name: str) -> Profile:
    """The profile called `name`."""
    if name not in PROFILES:
        raise unknown("profile", name, PROFILES)
    return PROFILES[name]


def opening(plan: Profile, gradients: bool) -> Attack:
    """The attack that every row meets first."""
    return Sprint(plan.opening, loss="log_odds") if gradients else Square(steps=50 * plan.opening, p=0.3)


@dataclass(frozen=True)
class Stage:
    """One thing to try, on the rows that came closest."""

    number: int
    name: str  # of what is tried
    rows: int  # how many of those that hold
    attack: Attack | None = None  # None: dig
    digs: int = 0
    tried: int = 0  # tries of gradients in the rounds before
    tries: int = 0  # and in this one
    before: int = 0  # stages of another kind that were numbered before the first attack

    def hunt(self, setting: Setting, front: Front) -> Hunt:
        """Try it on a front."""
        salt = (self.number - self.before) * _SALT
        if self.attack is None:
            attempts = tries(setting.threat.norm, self.tried, self.tries)
            return dig(setting, front, self.chains, self.digs // self.chains, attempts, salt)
        hunt = Hunt(setting, front)
        hunt.play(self.attack, salt)
        return hunt

    @property
    def chains(self) -> int:
        """Chains of digs that a row gets side by side; a model is asked about few rows at about the cost of many."""
        return max(1, self.digs // (1 if self.rows * self.digs < FULL else 2))


@dataclass
class Cascade:
    """Which stage comes next; it knows only how many rows held before and after each."""

    plan: Profile
    norm: str
    gradients: bool
    stage: Stage | None = None
    before: int = 0  # stages of another kind that were played; noise does not hang on them
    first: int = 0  # rows that the opening left
    spent: int = 0  # digs so far
    vain: int = 0  # of these, on rows that held

    def next(self, held: int, fell: int) -> Stage | None:
        """The stage after the last one, which broke `fell` rows and left `held`; None at the end."""
        last = self.stage
        if not held:
            self.stage = None
        elif last is None:
            attack = opening(self.plan, self.gradients)
            self.stage = Stage(self.before + 1, attack.name, held, attack, before=self.before)
        else:
            self.stage = self._round(last, held, fell)
        return self.stage

    def _round(self, last: Stage, held: int, fell: int) -> Stage | None:
        self.vain += (last.rows - fell) * last.digs
        if not last.digs:
            rows, digs, self.first = held, 1, held
        elif fell > STILL_FALLING * last.rows:
            rows, digs = last.rows, last.digs
        else:
            rows, digs = (last.rows + 1) // 2, 2 * last.digs
        rows = min(rows, held)
        self.spent += rows * digs
        work = self.plan.work
        paid = self.spent <= work * max(self.first, FEW)
        worth = self.vain + rows * digs <= work * max(held, 2 * FEW)  # where many fell, few are left to pay for
        if digs > self.plan.deepest or not paid or not worth:
            return None
        # In a wide ball tries take longer: there are fewer.
        count = max(1, digs * 3 // (8 if WIDTH[self.norm] == 1 else 16)) if self.gradients else 0
        name, tried = f"round of {digs}", last.tried + last.tries
        return Stage(last.number + 1, name, rows, None, digs, tried, count, self.before)


def nearest(gap: Tensor, ids: Tensor, count: int) -> Tensor:
    """(count,) the places of the largest gaps, in the order of `ids`; of equal gaps the lowest ids."""
    by_id = ids.argsort()
    chosen = by_id[gap[by_id].argsort(descending=True, stable=True)[:count]]
    return chosen[ids[chosen].argsort()]
