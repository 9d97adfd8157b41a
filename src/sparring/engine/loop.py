"""The loop: one model call a turn, shared by all seats; the judge looks; the attack steps; seats refill."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparring.core import noise
from sparring.core.attack import Attack, Observation
from sparring.core.batch import Batch
from sparring.core.errors import AttackError, UsageError
from sparring.core.judge import Judge, confidence
from sparring.core.model import Access, Model, Prediction
from sparring.core.threat import Threat
from sparring.engine import preflight
from sparring.engine import width as widths
from sparring.engine.outcome import Ledger, Outcome
from sparring.engine.scheduler import Case, Scheduler

Progress = Callable[[int, int], None]


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
    on_progress: Progress | None = None,
) -> Outcome:
    """Attack images `x` (n, c, h, w) with labels `y` (n,); what a row gets depends on that row alone.

    `sample` (n,) are ids that seed each row's noise (default: 0 to n - 1). `targets` (n, t) are classes to
    aim at, one try each; any wrong class counts if the judge says `any_wrong`, else t must be 1. Every try
    is made `restarts` times, until one succeeds. With `eight_bit` each point is rounded to an 8-bit image
    before the model sees it. `on_progress` is told (rows settled, rows) now and then.
    """
    judge = judge or Judge()
    if restarts < 1 or (width is not None and width < 1):
        raise UsageError(f"expected restarts and width of at least 1, got {restarts} and {width}")
    _check(model, attack, threat, x, y, targets, judge)
    sample = torch.arange(len(x), device=x.device) if sample is None else sample
    goal = torch.full_like(y, -1)[:, None] if targets is None else targets
    width = width or widths.automatic(x[0])
    rows = Batch(x, y, goal[:, 0], noise.keys(seed, sample, torch.zeros_like(sample)), threat)

    clean, clean_label, clean_score = replay(model, judge, rows, x, width)
    ledger = Ledger(threat, x, clean_label, clean_score)
    table = torch.where(~clean)[0]
    if len(table):
        ranks = restarts * goal.shape[1]
        Loop(
            model, attack, judge, rows, goal, sample, ledger, table, ranks, seed, eight_bit, width, on_progress
        ).run()
    confirmed = torch.zeros_like(clean)
    entered = torch.where(ledger.found)[0]
    if len(entered):  # judged again from what was stored
        again = replay(model, judge, rows.take(entered), ledger.best[entered], width)
        confirmed[entered], ledger.label[entered], ledger.score[entered] = again
    return Outcome(
        sample=sample,
        clean=clean,
        found=clean | confirmed,
        moved=ledger.found & ~confirmed,
        best=ledger.best,
        distance=threat.distance(ledger.best, x),
        clean_label=clean_label,
        clean_confidence=clean_score,
        label=ledger.label,
        confidence=ledger.score,
        forward=ledger.forward,
        backward=ledger.backward,
    )


def _check(
    model: Model, attack: Attack, threat: Threat, x: Tensor, y: Tensor, targets: Tensor | None, judge: Judge
) -> None:
    preflight.check_images(x, model.bounds)
    classes = preflight.check_model(model, x)
    preflight.check_labels(y, len(x), classes=classes)
    preflight.check_attack(model, attack, threat, targets)
    if targets is not None:
        preflight.check_labels(targets, len(x), "targets", classes)
        if targets.shape[1] > 1 and not judge.any_wrong:
            raise AttackError("expected one target a row; several are for Judge(any_wrong=True)")


def replay(model: Model, judge: Judge, rows: Batch, points: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Judge `points` (n, ...), one query each at a padded width: (n,) hits, labels and confidences."""
    while True:
        try:
            return _replay(model, judge, rows, points, width)
        except RuntimeError as error:
            if width == 1 or not widths.out_of_memory(error):
                raise
        width //= 2


def _replay(model: Model, judge: Judge, rows: Batch, points: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    hits, labels, scores = [], [], []
    access = min(model.access, Access.SCORE)
    for start in range(0, len(points), width):
        index = torch.arange(start, start + width, device=points.device).clamp_max(len(points) - 1)
        count = min(width, len(points) - start)
        answer = model.query(points[index], access)
        hits.append(judge.adversarial(rows.take(index), points[index], answer)[:count])
        labels.append(answer.labels[:count])
        scores.append(_score(answer)[:count])
    return torch.cat(hits), torch.cat(labels), torch.cat(scores)


def _score(answer: Prediction) -> Tensor:
    """(n,) confidences, NaN where the model gives labels only."""
    if answer.logits is None:
        return torch.full_like(answer.labels, torch.nan, dtype=torch.float64)
    return confidence(answer)


class Loop:
    """One run in progress: the seats, who sits there, and what they know."""

    def __init__(
        self,
        model: Model,
        attack: Attack,
        judge: Judge,
        rows: Batch,
        goal: Tensor,
        sample: Tensor,
        ledger: Ledger,
        open_rows: Tensor,
        ranks: int,
        seed: int,
        eight_bit: bool,
        width: int,
        on_progress: Progress | None,
    ) -> None:
        self.model, self.attack, self.judge, self.ledger = model, attack, judge, ledger
        self.rows, self.goal, self.sample, self.open_rows = rows, goal, sample, open_rows
        self.seed, self.eight_bit, self.width, self.on_progress = seed, eight_bit, width, on_progress
        self.access = max(attack.needs, judge.needs)
        self.scheduler = Scheduler(len(open_rows), ranks, width)
        self.refused: set[int] = set()
        self.batch: Batch
        self.state: Any = None
        self.row = torch.zeros(width, dtype=torch.int64, device=rows.x.device)
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
                self._turn()
            except RuntimeError as error:
                if self.width == 1 or not widths.out_of_memory(error):
                    raise
                self._start_over(self.width // 2)

    def _turn(self) -> None:
        """Ask, judge, note, step."""
        state, batch = self.state, self.batch
        x = batch.threat.quantise(state.x, batch.x) if self.eight_bit else state.x
        answer = self.model.query(x, self.access)
        hit = self.judge.adversarial(batch, x, answer)
        over = state.done if self.attack.minimizes else state.done | hit
        self.spent = (self.spent[0] + 1, self.spent[1])
        self._note(x, hit)
        leaving = (self.live & over).nonzero().squeeze(1)
        if len(leaving):
            self._say_goodbye(leaving, x, answer, hit)
        if self.scheduler.seated:
            seen = Observation(batch, answer, hit, self.attack.needs)
            self.state = self.attack.step(batch, state, seen)
            self.spent = (self.spent[0], self.spent[1] + seen.backward_passes)

    def _note(self, x: Tensor, hit: Tensor) -> None:
        """Enter the live rows' adversarial points."""
        at = (hit & self.live).nonzero().squeeze(1)
        if len(at):
            self.ledger.enter(self.row[at], self.rank[at], x[at], nearest=self.attack.minimizes)

    def _say_goodbye(self, leaving: Tensor, x: Tensor, answer: Prediction, hit: Tensor) -> None:
        """Free the seats of the cases that are over, and of those that a success cancels."""
        last = Prediction(answer.labels[leaving], None if answer.logits is None else answer.logits[leaving])
        self.ledger.give_up(self.row[leaving], self.rank[leaving], x[leaving], last.labels, _score(last))
        for seat, won in zip(leaving.tolist(), hit[leaving].tolist(), strict=True):
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
        if self.on_progress:
            self.on_progress(self.scheduler.settled, len(self.open_rows))

    def _refill(self) -> None:
        """Seat waiting cases; when none is left, move together if the model's bits allow."""
        came = self.scheduler.refill()
        if came:
            self._seat(came)
        elif not self.scheduler.waiting and self.scheduler.seated:
            self._narrow()

    def _seat(self, came: dict[int, Case]) -> None:
        device = self.row.device
        seats = torch.tensor(list(came), device=device)
        row = self.open_rows[torch.tensor([case.row for case in came.values()], device=device)]
        rank = torch.tensor([case.rank for case in came.values()], device=device)
        fresh = Batch(
            self.rows.x[row],
            self.rows.y[row],
            self.goal[row, rank % self.goal.shape[1]],
            noise.keys(self.seed, self.sample[row], rank),
            self.rows.threat,
        )
        start = self.attack.init(fresh)
        if self.state is None:  # the first to come sit in order, and pad the empty seats
            everywhere = torch.arange(self.width, device=device) % len(seats)
            self.batch, self.state = fresh.take(everywhere), start.take(everywhere)
        else:
            self.batch, self.state = self.batch.put(seats, fresh), self.state.put(seats, start)
        self.row, self.rank = self.row.index_copy(0, seats, row), self.rank.index_copy(0, seats, rank)
        self.since |= dict.fromkeys(came, self.spent)
        self._mark_live()

    def _narrow(self) -> None:
        width = widths.narrower(len(self.scheduler.seated), self.width)
        if width == self.width or width in self.refused:
            return
        if not widths.same_bits(self.model, self.state.x, width, self.access):
            self.refused.add(width)
            return
        old = self.scheduler.compact(width)
        self.since = {new: self.since[seat] for new, seat in enumerate(old)}
        index = torch.tensor(old + old[:1] * (width - len(old)), device=self.row.device)
        self.batch, self.state, self.width = self.batch.take(index), self.state.take(index), width
        self.row, self.rank, self.live = self.row[index], self.rank[index], self.live[index]
        self._mark_live()

    def _start_over(self, width: int) -> None:
        """Too little memory: everybody seated begins again, at half the width."""
        self._charge(list(self.since))
        self.scheduler.start_over(width)
        self.state, self.width = None, width
        self.row, self.rank, self.live = (
            self.row[:width],
            self.rank[:width],
            torch.zeros_like(self.live[:width]),
        )
