"""What the figures of a defense come to, in words: a pure function of counts of rows.

Every comparison is between shares of the same rows, so what counts are the rows on which two sides differ.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparring.auditing.intervals import clopper_pearson
from sparring.core.showing import percent

HOLDS, HIDES = "holds", "hides the gradient"
BREAKS, COSTS = "breaks", "costs more than it gives"
REFERENCE = "reference"  # of the undefended net, which is no defense

LEVEL = 0.95
SEEMS = 0.1  # of all rows: on healthy nets, too, a short attack without restarts leaves some that an audit breaks
MATTERS = 0.05  # of all rows: what a defense gives less of is not worth its name
FALLEN = 0.5  # of the rows that are right untouched


@dataclass(frozen=True)
class Counts:
    """Rows of a defense beside those of the undefended net; held: right untouched, and right under attack."""

    rows: int
    right: int  # untouched
    naive: int  # held against the attack that ignores the defense
    adaptive: int  # held against everything
    gained: int  # held here, not undefended
    given: int  # held undefended, not here
    lost: int  # right undefended, wrong here, untouched
    won: int  # the other way round


@dataclass(frozen=True)
class Share:
    """A share of all rows with the interval that holds it for all such images, with `LEVEL` confidence."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{percent(self.value, 1)} ({percent(self.low, 1)} to {percent(self.high, 1)})"

    def than(self, more: str, less: str) -> str:
        """Such as `2.5 % (-1.0 % to 6.0 %) more`; of a share below 0 the other way round, with `less`."""
        return f"{self} {more}" if self.value >= 0 else f"{Share(-self.value, -self.high, -self.low)} {less}"


@dataclass(frozen=True)
class Finding:
    """One of the words above, a sentence that says why, and the shares that decided."""

    word: str
    sentence: str
    illusion: Share  # held naively, fell adaptively
    gain: Share  # held here less held undefended
    price: Share  # clean accuracy lost


def difference(plus: int, minus: int, rows: int) -> Share:
    """(plus - minus) / rows, between exact intervals of either count, whose errors add up to 1 - LEVEL at most."""
    if not rows:
        return Share(0.0, -1.0, 1.0)
    each = 1 - (1 - LEVEL) / 2
    (low, high), (least, most) = (clopper_pearson(count, rows, each) for count in (plus, minus))
    return Share((plus - minus) / rows, low - most, high - least)


def judge(counts: Counts, *, reference: bool = False) -> Finding:
    """What a defense comes to.

    It *hides the gradient* if the rows that seemed to hold and do not are surely (the interval's lower end) more
    than `SEEMS` of all, and more than what it gives. It *holds* if it surely gives more than `MATTERS`, and gives
    more than it takes in clean accuracy; else it *costs more than it gives*. What gives nothing *breaks* if the share
    `FALLEN` of its right rows falls, and costs more than it gives if little falls with or without it.
    """
    rows = counts.rows
    seemed = counts.naive - counts.adaptive
    low, high = clopper_pearson(seemed, rows) if rows else (0.0, 1.0)
    illusion = Share(seemed / max(rows, 1), low, high)
    gain = difference(counts.gained, counts.given, rows)
    price = difference(counts.lost, counts.won, rows)
    word = _word(counts, illusion, gain, price)
    if reference:
        word = REFERENCE
    return Finding(word, _sentence(word, counts, illusion, gain, price), illusion, gain, price)


def _word(counts: Counts, illusion: Share, gain: Share, price: Share) -> str:
    if illusion.low > SEEMS and illusion.value > gain.value:
        return HIDES
    if gain.low > MATTERS:
        return HOLDS if gain.value > price.value else COSTS
    return BREAKS if counts.adaptive <= FALLEN * counts.right else COSTS


def _sentence(word: str, counts: Counts, illusion: Share, gain: Share, price: Share) -> str:
    rows = max(counts.rows, 1)
    naive, adaptive = percent(counts.naive / rows, 1), percent(counts.adaptive / rows, 1)
    if word == REFERENCE:
        return f"{naive} hold against the naive attack, {adaptive} against all; the others are measured against this"
    given = f"{gain.than('more', 'less')} than undefended"
    if word == HIDES:
        return f"{naive} seem to hold and {adaptive} do: {illusion} fall only to who knows of it; it gives {given}"
    if word == BREAKS:
        why = "too little to speak of" if gain.value <= MATTERS else "perhaps too little to speak of"
        return f"{adaptive} hold (naively {naive}), {given}: {why}"
    return f"{adaptive} hold, {given} (naively {naive}), with a clean accuracy {price.than('lower', 'higher')}"
