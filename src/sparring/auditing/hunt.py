"""The search for one chunk of rows: short attacks, each beginning where the one before came closest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparring.attacks.sprint import Sprint
from sparring.attacks.square import Square
from sparring.core.attack import Attack
from sparring.core.batch import Batch, Rows
from sparring.core.judge import Judge
from sparring.core.model import Access, Model, passes
from sparring.core.threat import Threat
from sparring.engine.loop import Task, search
from sparring.engine.outcome import Ledger
from sparring.engine.replay import replay
from sparring.engine.width import Known

JUDGE = Judge(any_wrong=True)


@dataclass(frozen=True)
class Setting:
    """What a hunt is for, and with what."""

    model: Model
    threat: Threat
    width: int
    seed: int = 0
    eight_bit: bool = False
    device: str = "cpu"
    stop: Callable[[], bool] = lambda: False
    known: Known = field(default_factory=Known)

    @property
    def gradients(self) -> bool:
        """May attacks ask for gradients?"""
        return self.model.access >= Access.GRADIENT


@dataclass(frozen=True)
class Front(Rows):
    """Rows that hold so far."""

    x: Tensor  # (n, c, h, w) clean images
    y: Tensor  # (n,) int64
    ids: Tensor  # (n,) int64
    best: Tensor  # (n, c, h, w) the legal point that came closest to an error
    gap: Tensor  # (n,) float32 max z_other - z_y there: negative

    def to(self, device: str) -> Front:
        """The same rows on a device."""
        return self._map(lambda _, tensor: tensor.to(device))


class Hunt:
    """Attacks on the rows of a front, one after the other; found, closest and spent are kept a row."""

    def __init__(self, setting: Setting, front: Front, chain: int | Tensor = 0) -> None:
        self.setting, self.y = setting, front.y
        self.x, self.best, self.gap = front.x, front.best.clone(), front.gap.clone()
        self.noise_ids = front.ids + (chain << 40)  # so that every chain of a row draws noise of its own
        self.found = torch.zeros_like(front.y, dtype=torch.bool)
        self.failed: dict[int, str] = {}
        self.forward, self.backward = torch.zeros_like(front.y), torch.zeros_like(front.y)
        self.stopped = False

    @property
    def open(self) -> Tensor:
        """(m,) rows that still hold and that the model answers for."""
        held = ~self.found
        held[list(self.failed)] = False
        return held.nonzero().squeeze(1)

    def play(self, attack: Attack, salt: int, at: Tensor | None = None, goal: Tensor | None = None) -> None:
        """Run `attack` on the rows `at` (default: all that hold), towards `goal` (m,) if that is given."""
        at = self.open if at is None else at
        if self.stopped or not len(at):
            return
        setting, x, y = self.setting, self.x[at], self.y[at]
        aim = torch.full_like(y, -1) if goal is None else goal
        rows = Batch(x, y, aim, at, setting.threat, self.best[at])  # its keys come from `sample`
        ledger = Ledger(setting.threat, x, y, torch.zeros_like(y, dtype=torch.float64))
        task = Task(
            rows,
            self.noise_ids[at],
            aim[:, None],
            torch.arange(len(at), device=x.device),
            seed=setting.seed * 1_000_003 + salt,
            eight_bit=setting.eight_bit,
            closest=True,
            stop=setting.stop,
            known=setting.known,
        )
        search(setting.model, attack, JUDGE, task, ledger, setting.width)
        self._absorb(ledger, at)

    def _absorb(self, ledger: Ledger, at: Tensor) -> None:
        self.forward.index_add_(0, at, ledger.forward)
        self.backward.index_add_(0, at, ledger.backward)
        places = at.tolist()
        self.failed |= {places[row]: why for row, why in ledger.reasons.items()}
        won = at[ledger.found]
        self.found[won], self.best[won] = True, ledger.best[ledger.found]
        nearer = ~ledger.found & (ledger.gap > self.gap[at])
        self.best[at[nearer]], self.gap[at[nearer]] = ledger.best[nearer], ledger.gap[nearer]
        self.stopped = self.stopped or bool(ledger.unsettled)

    def targets(self, at: Tensor, place: Tensor | int) -> Tensor:
        """(m,) for rows `at`: the wrong class that is `place`-th likeliest (from 0) where the row came closest."""
        once, back = torch.unique(at, return_inverse=True)
        aim = torch.full_like(once, -1)
        rows = Batch(self.x[once], self.y[once], aim, aim, self.setting.threat)
        setting = self.setting
        width = setting.known.fitting(len(once), setting.width, Access.SCORE)
        judged = replay(setting.model, JUDGE, rows, self.best[once], width)
        self.forward[once] += passes(setting.model)
        if judged.logits is None:
            return torch.full_like(at, -1)
        logits = judged.logits[back].nan_to_num(-torch.inf).scatter(1, self.y[at][:, None], -torch.inf)
        order = logits.argsort(dim=1, descending=True, stable=True)[:, : logits.shape[1] - 1]
        wanted = torch.as_tensor(place, device=at.device).clamp_min(0).expand(len(at)) % order.shape[1]
        return order.gather(1, wanted[:, None]).squeeze(1)

    def take_over(self, each: Hunt, row: Tensor) -> None:
        """Bear the costs and the failures of chains, whose rows are `row`."""
        self.forward.index_add_(0, row, each.forward)
        self.backward.index_add_(0, row, each.backward)
        places = row.tolist()
        failed = {} if each.stopped else {places[at]: why for at, why in each.failed.items()}
        self.failed |= {at: why for at, why in failed.items() if not self.found[at]}
        self.stopped = self.stopped or each.stopped

    def dig(self, salt: int, at: Tensor | None = None) -> None:
        """A little random search from where the row came closest, then a few gradient steps from there."""
        self.play(DIG, salt, at)
        if self.setting.gradients:
            at = self.open if at is None else at
            held = ~self.found
            held[list(self.failed)] = False
            self.play(POLISH, salt + 1, at[held[at]])


DIG = Square(steps=45, p=0.1, mixed=True, warm=True)
POLISH = Sprint(steps=3, first=0.3, start="given")
WIDTH = {"linf": 1.0, "l2": 8.0, "l1": 24.0}  # how wide the ball is in which tries begin
PLACES = (None, 1, 2, 0, 1, 3, None, 0, 2, 4, None, 1, 0, 5, 3, None, 6, 0, 1, 7)  # the sprint went for the likeliest
Try = tuple[Attack, int | None]  # with the wrong class to aim at, by likelihood


def tries(norm: str, first: int, count: int) -> list[Try]:
    """The tries of gradients numbered from `first` on: from blocks and away, or at random and at a likely class."""
    wide = WIDTH[norm]
    away = Sprint(steps=10 if wide == 1 else 16, loss="log_odds", start="blocks", wide=wide)
    aimed = Sprint(steps=12 if wide == 1 else 16, first=1.25 if wide == 1 else 2.0, loss="lead", wide=wide)
    places = [PLACES[number % len(PLACES)] for number in range(first, first + count)]
    return [(away if place is None else aimed, place) for place in places]


def dig(setting: Setting, front: Front, chains: int, digs: int, attempts: Sequence[Try], salt: int) -> Hunt:
    """Tries of gradients from elsewhere, then `digs` digs on each of `chains` chains from where the row came closest.

    A row is broken by the first of these that breaks it; of several side by side the lowest counts.
    """
    whole = Hunt(setting, front)
    if setting.gradients:
        _try(whole, front, attempts, salt)
    at = whole.open
    held = Front(front.x[at], front.y[at], front.ids[at], whole.best[at], whole.gap[at])
    each, row = _side_by_side(setting, held, chains)
    for turn in range(digs):
        live = each.open
        live = live[~whole.found[at[row[live]]]]
        if not len(live) or each.stopped or whole.stopped:
            break
        each.dig(salt + len(PLACES) + 2 * turn, live)
        if not each.stopped:  # else a lower chain might have found something too
            _gather(whole, at, each)
    whole.take_over(each, at[row])
    return whole


def _try(whole: Hunt, front: Front, attempts: Sequence[Try], salt: int) -> None:
    """Tries side by side, those of one kind together."""
    each, row = _side_by_side(whole.setting, front, len(attempts))
    each.gap = torch.full_like(each.gap, -torch.inf)
    which = torch.arange(len(attempts), device=row.device).repeat_interleave(len(front.y))
    for kind, attack in enumerate(dict.fromkeys(attack for attack, _ in attempts)):
        aims = [aim if kin == attack else -2 for kin, aim in attempts]
        aim = torch.tensor([-1 if place is None else place for place in aims], device=row.device)[which]
        at = (aim > -2).nonzero().squeeze(1)
        at = at[~whole.found[row[at]]]
        if len(at):
            goal = whole.targets(row[at], aim[at]) if int(aim[at].max()) >= 0 else None
            each.play(attack, salt + kind, at, goal)
            if not each.stopped:
                _gather(whole, torch.arange(len(front.y), device=row.device), each)
    whole.take_over(each, row)


def _side_by_side(setting: Setting, front: Front, chains: int) -> tuple[Hunt, Tensor]:
    """A hunt with `chains` chains of every row, and the row of each."""
    row = torch.arange(len(front.y), device=front.y.device).repeat(chains)
    chain = torch.arange(chains, device=row.device).repeat_interleave(len(front.y))
    return Hunt(setting, front.take(row), chain), row


def _gather(whole: Hunt, at: Tensor, each: Hunt) -> None:
    """Tell the rows `at` what their chains have found; where none has, the closest of them counts."""
    for start in range(0, len(each.y), len(at)):
        part = slice(start, start + len(at))
        won = each.found[part] & ~whole.found[at]
        whole.found[at[won]], whole.best[at[won]] = True, each.best[part][won]
    for start in range(0, len(each.y), len(at)):
        part = slice(start, start + len(at))
        nearer = ~whole.found[at] & ~each.found[part] & (each.gap[part] > whole.gap[at])
        whole.best[at[nearer]], whole.gap[at[nearer]] = each.best[part][nearer], each.gap[part][nearer]
