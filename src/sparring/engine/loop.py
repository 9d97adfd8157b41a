"""The loop: one model call a turn, shared by all seats; the judge looks; the attack steps; seats refill."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparring.core import noise
from sparring.core.attack import Attack, Observation
from sparring.core.batch import Batch
from sparring.core.errors import AttackError, UsageError
from sparring.core.judge import Judge, weighed
from sparring.core.model import Access, Model, Prediction, fresh, passes
from sparring.core.threat import Threat
from sparring.engine import preflight
from sparring.engine import width as widths
from sparring.engine.asking import ask
from sparring.engine.outcome import Ledger, Outcome
from sparring.engine.process import shared_cores
from sparring.engine.replay import replay, score
from sparring.engine.scheduler import Case, Scheduler

Progress = Callable[[int, int], None]
MANY = 10  # draws of a random model that agree: others will too; of fewer, chance makes all agree too often


@dataclass(frozen=True)
class Task:
    """What a search is to do."""

    rows: Batch  # all rows; a case takes its target from `goal` and its noise key from `sample` and its rank
    sample: Tensor  # (n,) int64 ids that seed each row's noise
    goal: Tensor  # (n, t) int64 classes to aim at, one try each; -1 for any wrong one
    open: Tensor  # (m,) the rows to work on
    restarts: int = 1
    seed: int = 0
    eight_bit: bool = False  # round each point to an 8-bit image before the model sees it
    budget: int | None = None  # forward and backward passes that a try may spend
    closest: bool = False  # of a row that holds keep the point that came closest, not the last one
    known: widths.Known = field(default_factory=widths.Known)  # what earlier searches found out about widths
    stop: Callable[[], bool] = lambda: False  # asked each turn; when true, everybody leaves unsettled
    on_progress: Progress | None = None

    @property
    def ranks(self) -> int:
        """Tries a row."""
        return self.restarts * self.goal.shape[1]


def run(
    model: Model,
    attack: Attack,
    threat: Threat,
    x: Tensor,
    y: Tensor,
    *,
    sample: Tensor | None = None,
    targets: Tensor | None = None,
    restarts: int = 1,
    seed: int = 0,
    judge: Judge | None = None,
    eight_bit: bool = False,
    width: int | None = None,
    budget: int | None = None,
    on_progress: Progress | None = None,
) -> Outcome:
    """Attack images `x` (n, c, h, w) with labels `y` (n,); what a row gets depends on that row alone.

    `sample` (n,) are ids that seed each row's noise (default: 0 to n - 1). `targets` (n, t) are classes to
    aim at, one try each; any wrong class counts if the judge says `any_wrong`, else t must be 1. Every try
    is made `restarts` times, until one succeeds. With `eight_bit` each point is rounded to an 8-bit image
    before the model sees it. With `budget` a try ends before a turn that would take it past so many forward and
    backward passes. `on_progress` is told (rows settled, rows) now and then.
    """
    judge = judge or Judge()
    if restarts < 1 or (width is not None and width < 1):
        raise UsageError(f"expected restarts and width of at least 1, got {restarts} and {width}")
    _check(model, attack, threat, x, y, targets, judge)
    sample = torch.arange(len(x), device=x.device) if sample is None else sample
    goal = torch.full_like(y, -1)[:, None] if targets is None else targets
    width = width or widths.automatic(x[0])
    rows = Batch(x, y, goal[:, 0], noise.keys(seed, sample, torch.zeros_like(sample)), threat)

    clean = replay(model, judge, rows, x, width)
    ledger = Ledger(threat, x, clean.label, clean.score)
    ledger.fail(clean.failed)
    table = torch.where(~clean.hit & ~ledger.failed)[0]
    task = Task(rows, sample, goal, table, restarts, seed, eight_bit, budget, on_progress=on_progress)
    search(model, attack, judge, task, ledger, width)
    confirmed = torch.zeros_like(clean.hit)
    entered = torch.where(ledger.found)[0]
    if len(entered):  # judged again from what was stored, and under other draws if the model is random
        again = replay(fresh(model), judge, rows.take(entered), ledger.best[entered], width)
        confirmed[entered], ledger.label[entered], ledger.score[entered] = again.hit, again.label, again.score
    return Outcome(
        sample=sample,
        clean=clean.hit,
        found=clean.hit | confirmed,
        moved=ledger.found & ~confirmed,
        failed=ledger.failed & ~confirmed,
        best=ledger.best,
        distance=threat.distance(ledger.best, x),
        clean_label=clean.label,
        clean_confidence=clean.score,
        label=ledger.label,
        confidence=ledger.score,
        forward=ledger.forward,
        backward=ledger.backward,
    )


def search(model: Model, attack: Attack, judge: Judge, task: Task, ledger: Ledger, width: int) -> None:
    """Work through a task; what is found, and what it cost, is entered in the ledger."""
    if len(task.open):
        with shared_cores():
            Loop(model, attack, judge, task, ledger, width).run()


def _check(
    model: Model, attack: Attack, threat: Threat, x: Tensor, y: Tensor, targets: Tensor | None, judge: Judge
) -> None:
    preflight.check_images(x, model.bounds)
    classes = preflight.check_model(model, x, min(attack.needs, model.access))
    preflight.check_labels(y, len(x), classes=classes)
    preflight.check_attack(model, attack, threat, targets)
    if targets is not None:
        preflight.check_labels(targets, len(x), "targets", classes)
        if targets.shape[1] > 1 and not judge.any_wrong:
            raise AttackError("expected one target a row; several are for Judge(any_wrong=True)")


class Loop:
    """One search in progress: the seats, who sits there, and what they know."""

    def __init__(self, model: Model, attack: Attack, judge: Judge, task: Task, ledger: Ledger, width: int) -> None:
        self.model, self.attack, self.judge, self.task, self.ledger = model, attack, judge, task, ledger
        self.access, self.passes = max(attack.needs, judge.needs), passes(model)
        self.full = width  # whose bits all narrower ones must give
        self.width = width = task.known.fitting(len(task.open) * task.ranks, width, self.access)
        self.scheduler = Scheduler(len(task.open), task.ranks, width)
        self.batch: Batch
        self.state: Any = None
        self.near: Tensor | None = None  # (width, c, h, w) the closest point of every seat, if asked for
        self.gap = torch.zeros(width, device=task.rows.x.device)  # and how far it fell short
        self.row = torch.zeros(width, dtype=torch.int64, device=task.rows.x.device)
        self.rank = torch.zeros_like(self.row)
        self.live = torch.zeros_like(self.row, dtype=torch.bool)
        self.spent = (0, 0)  # forward and backward passes of every seat so far
        self.since: dict[int, tuple[int, int]] = {}  # what `spent` was when a seat was taken

    def run(self) -> None:
        """Take turns until nobody is seated."""
        while True:
            try:
                self._refill()
                if not self.scheduler.seated:
                    return
                if self.task.stop():
                    self._charge(list(self.since))
                    self.ledger.unsettled.update(self._open(self.scheduler.unsettled))
                    return
                self._turn()
            except RuntimeError as error:
                if self.width == 1 or not widths.out_of_memory(error):
                    raise
                self._start_over(self.width // 2)

    def _open(self, rows: list[int]) -> list[int]:
        """The table's rows behind the scheduler's."""
        found: list[int] = self.task.open[torch.tensor(rows, dtype=torch.int64)].tolist()
        return found

    def _turn(self) -> None:
        """Ask, judge, note, step."""
        state, batch = self.state, self.batch
        x = batch.threat.quantise(state.x, batch.x) if self.task.eight_bit else state.x
        answer = ask(self.model, x, self.access)
        said = answer.prediction
        if answer.failed:
            self._excuse(answer.failed)
            return
        hit = self.judge.adversarial(batch, x, said)
        won = hit if said.votes is None else hit & self._agreed(said.votes) & (self.passes >= MANY)
        over = state.done if self.attack.minimizes else state.done | won
        self.spent = (self.spent[0] + self.passes, self.spent[1])
        if self.task.budget is not None:
            over = over | self._exhausted(self.task.budget)
        self._note(x, hit, said)
        leaving = (self.live & over).nonzero().squeeze(1)
        if len(leaving):
            self._say_goodbye(leaving, x, said, hit)
        if self.scheduler.seated:
            seen = Observation(batch, said, hit, self.attack.needs)
            self.state = self.attack.step(batch, state, seen)
            self.spent = (self.spent[0], self.spent[1] + seen.backward_passes * self.passes)

    def _exhausted(self, budget: int) -> Tensor:
        """(width,) bool: the cases that cannot pay for a step and the question after it."""
        price = self.passes * (2 if self.attack.needs == Access.GRADIENT else 1)
        passed = sum(self.spent)
        spent = [seat for seat, since in self.since.items() if passed - sum(since) + price > budget]
        over = torch.zeros_like(self.live)
        over[torch.tensor(spent, dtype=torch.int64, device=over.device)] = True
        return over

    def _excuse(self, failed: dict[int, str]) -> None:
        """Rows the model cannot answer leave for good; who sits there gives way, and the turn is taken again."""
        seats = [seat for seat in failed if seat in self.scheduler.seated]
        rows = self.row.tolist()
        self.ledger.fail({rows[seat]: failed[seat] for seat in seats})
        for seat in seats:
            if seat in self.scheduler.seated:
                self.scheduler.expel(seat)
        self.spent = (self.spent[0] + self.passes, self.spent[1])
        self._charge([seat for seat in self.since if seat not in self.scheduler.seated])
        for seat in self.scheduler.seated:  # they were asked for nothing and will be asked again
            self.since[seat] = (self.since[seat][0] + self.passes, self.since[seat][1])
        if self.scheduler.seated:
            index = torch.arange(self.width, device=self.row.device)
            index[torch.tensor(sorted(failed), device=index.device)] = next(iter(self.scheduler.seated))
            self._rearrange(index)
        else:
            self.state = None
        self._mark_live()

    def _note(self, x: Tensor, hit: Tensor, said: Prediction) -> None:
        """Enter the live rows' adversarial points, and keep who came closer than before."""
        at = (hit & self.live).nonzero().squeeze(1)
        if len(at):
            depth, nearest = self._depth(said, at), self.attack.minimizes
            self.ledger.enter(self.row[at], self.rank[at], x[at], nearest=nearest, depth=depth)
        if self.near is not None and (logits := weighed(self.batch, said)) is not None:
            gap = self.judge.shortfall(self.batch, logits)
            closer = (gap > self.gap).nonzero().squeeze(1)
            if len(closer):
                points = x[closer]
                legal = self.batch.threat.contains(points, self.batch.x[closer])
                if not legal.all():
                    closer, points = closer[legal], points[legal]
                self.near.index_copy_(0, closer, points)
                self.gap.index_copy_(0, closer, gap[closer])

    def _agreed(self, votes: Tensor) -> Tensor:
        """(width,) bool: do all draws of a random model name one label, and is that all that the judge asks for?"""
        return (votes == 1) & (self.judge.confidence == 0)

    def _depth(self, said: Prediction, at: Tensor) -> Tensor | None:
        """(m,) how safe a random model's answers `at` (m,) are from other draws; None where nothing is random.

        A point on the border of the mean over some draws is on the wrong side of it for half of all others.
        """
        if said.votes is None:
            return None
        logits = weighed(self.batch, said)
        margin = said.votes if logits is None else self.judge.shortfall(self.batch, logits)
        return margin.masked_fill(self._agreed(said.votes) & self.attack.minimizes, torch.inf)[at]

    def _say_goodbye(self, leaving: Tensor, x: Tensor, said: Prediction, hit: Tensor) -> None:
        """Free the seats of the cases that are over, and of those that a success cancels."""
        rows, rank = self.row[leaving], self.rank[leaving]
        if self.near is not None:
            self.ledger.approach(rows, rank, self.near[leaving], self.gap[leaving])
        else:
            last = Prediction(said.labels[leaving], None if said.logits is None else said.logits[leaving])
            self.ledger.give_up(rows, rank, x[leaving], last.labels, score(last))
        broke = hit[leaving] if said.votes is None else self.ledger.owns(rows, rank)
        for seat, won in zip(leaving.tolist(), broke.tolist(), strict=True):
            if seat not in self.scheduler.seated:
                continue  # cancelled by a sibling a moment ago
            if won and not self.attack.minimizes:
                self.scheduler.succeed(seat)
            else:
                self.scheduler.leave(seat)
        self._charge([seat for seat in self.since if seat not in self.scheduler.seated])
        self._mark_live()

    def _charge(self, seats: list[int]) -> None:
        """Put what was spent on the cases that sat here on their rows' account."""
        begun = [self.since.pop(seat) for seat in seats]
        rows = self.row[torch.tensor(seats, dtype=torch.int64, device=self.row.device)]
        forward, backward = self.spent
        self.ledger.charge(rows, [forward - f for f, _ in begun], [backward - b for _, b in begun])

    def _mark_live(self) -> None:
        self.live = torch.zeros_like(self.live)
        self.live[torch.tensor(list(self.scheduler.seated), dtype=torch.int64, device=self.live.device)] = True
        if self.task.on_progress:
            self.task.on_progress(self.scheduler.settled, len(self.task.open))

    def _refill(self) -> None:
        """Seat waiting cases; when none is left, move together if the model's bits allow."""
        came = self.scheduler.refill()
        if came:
            self._seat(came)
        elif not self.scheduler.waiting and self.scheduler.seated:
            self._narrow()

    def _seat(self, came: dict[int, Case]) -> None:
        task, device = self.task, self.row.device
        seats = torch.tensor(list(came), device=device)
        row = task.open[torch.tensor([case.row for case in came.values()], device=device)]
        rank = torch.tensor([case.rank for case in came.values()], device=device)
        fresh = Batch(
            task.rows.x[row],
            task.rows.y[row],
            task.goal[row, rank % task.goal.shape[1]],
            noise.keys(task.seed, task.sample[row], rank),
            task.rows.threat,
            None if task.rows.start is None else task.rows.start[row],
        )
        start = self.attack.init(fresh)
        if self.state is None:  # the first to come sit in order, and pad the empty seats
            everywhere = torch.arange(self.width, device=device) % len(seats)
            self.batch, self.state = fresh.take(everywhere), start.take(everywhere)
            self.near = torch.zeros_like(self.batch.x) if task.closest else None
        else:
            self.batch, self.state = self.batch.put(seats, fresh), self.state.put(seats, start)
        self.row, self.rank = self.row.index_copy(0, seats, row), self.rank.index_copy(0, seats, rank)
        self.gap = self.gap.index_fill(0, seats, -torch.inf)
        self.since |= dict.fromkeys(came, self.spent)
        self._mark_live()

    def _rearrange(self, index: Tensor) -> None:
        """Let who sits at `index` sit at 0, 1, ..."""
        self.batch, self.state, self.width = self.batch.take(index), self.state.take(index), len(index)
        self.row, self.rank, self.gap = self.row[index], self.rank[index], self.gap[index]
        self.near = None if self.near is None else self.near[index]

    def _narrow(self) -> None:
        width = widths.narrower(len(self.scheduler.seated), self.width)
        if width == self.width or not self.task.known.ask(self.model, self.state.x, width, self.full, self.access):
            return
        old = self.scheduler.compact(width)
        self.since = {new: self.since[seat] for new, seat in enumerate(old)}
        self._rearrange(torch.tensor(old + old[:1] * (width - len(old)), device=self.row.device))
        self.live = self.live[:width]
        self._mark_live()

    def _start_over(self, width: int) -> None:
        """Too little memory: everybody seated begins again, at half the width."""
        self._charge(list(self.since))
        self.scheduler.start_over(width)
        self.state, self.width, self.full = None, width, width
        self.row, self.rank, self.gap = self.row[:width], self.rank[:width], self.gap[:width]
        self.live = torch.zeros_like(self.live[:width])
