"""The checklist: what makes a robustness figure unreliable, measured sign by sign on a sample of rows.

From Carlini et al. 2019, arXiv:1902.06705 (sections 3 and 4); Athalye et al. 2018, arXiv:1802.00420 (section 3.1);
Croce and Hein 2020, arXiv:2003.01690, and the flags of their AutoAttack; Pintor et al. 2022, arXiv:2106.09947
(indicators of attack failure).

One quick attack comes first. A row that it breaks cannot witness against gradients, so that whatever costs
more is spent only on the rows that held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

from sparring.attacks.fgsm import FGSM
from sparring.attacks.pgd import PGD
from sparring.attacks.sprint import Sprint
from sparring.attacks.square import Square
from sparring.core import losses, noise
from sparring.core.attack import Attack
from sparring.core.batch import Batch
from sparring.core.judge import Judge
from sparring.core.model import Access, Model, passes
from sparring.core.showing import number_of
from sparring.core.threat import Linf, Threat
from sparring.engine import width as widths
from sparring.engine.asking import ask
from sparring.engine.loop import Task, search
from sparring.engine.outcome import Ledger
from sparring.engine.replay import Judged, replay

Stop = Callable[[], bool]

# A sign is raised when its measure is above its threshold.
RANDOM_OUTPUTS = 1e-4  # AutoAttack's check_randomized: L2 distance of unit logits
PROBABILITIES = 0.99  # share of rows; in a sample of 64 this means all of them
SIMPLEX = 1e-5  # AutoAttack's check_range_output: how far a probability may lie below 0, and a sum from 1
ZERO_GRADIENT = 0.05  # AutoAttack's check_zero_gradients flags a single row; dead ReLUs alone account for a few
SHARE = 0.02  # of all rows; Athalye et al. allow none, check_square_sr 0.002: but a short attack misses a few
NOISE = 0.01  # of all rows; noise has no aim, so even one row in a hundred is telling
CLIMB = 0.05  # of the whole rise of the margin; Pintor et al., "incomplete optimization", have the same
AUTOGRAD = 0.0  # AutoAttack's check_dynamic

CALLS = 5  # AutoAttack's check_randomized
STEPS = 12  # of the quick attack; later it gets twice as many
STARTS = 3  # of either; with a single one 4 in 10 checks of small healthy nets said that more steps help
LAST = 10  # last steps, over which the margin may rise no more; so many in the code of Pintor et al.
BEFORE = 20  # steps before these
STRIDE = 0.15  # of eps, each step: those before suffice to reach any point of the ball
SQUARES = 150
DRAWS = 20
FEW = 4  # rows in the query that is watched for autograd


@dataclass(frozen=True)
class Sign:
    """One warning sign: what was measured, and whether it speaks against the figure."""

    name: str
    raised: bool
    measure: float | None  # None: not measured, `finding` says why
    threshold: float  # raised when `measure` is above it
    finding: str  # one sentence: what was measured and what came
    advice: str  # what to do when it is raised


@dataclass(frozen=True)
class Cost:
    """What was spent, in passes of one row."""

    forward: int
    backward: int


# The order in which they are reported; with each its threshold, and what to do.
KINDS: dict[str, tuple[float, str]] = {
    "random_outputs": (RANDOM_OUTPUTS, "Attack the mean of many calls: wrap the model as EOT(model, n)."),
    "probabilities": (PROBABILITIES, "Drop the final softmax, or say so: wrap(net, probabilities=True)."),
    "zero_gradient": (ZERO_GRADIENT, "Give the layer that stops the gradient another backward pass: bpda(layer)."),
    "one_step_beats_iterative": (SHARE, "The loss is rough: try larger steps, restarts, and smoothed gradients."),
    "black_box_beats_white_box": (SHARE, "Gradients mislead: use bpda(layer) or EOT(model, n), and report Square."),
    "success_falls_with_eps": (SHARE, "The attack loses its way: change its step size, its loss, its starts."),
    "unbounded_attack_fails": (SHARE, "Some gradient must be stopped or broken: use bpda(layer), and try Square."),
    "loss_still_climbing": (CLIMB, "The attack has not converged: raise its steps until the figure stands still."),
    "more_steps_still_help": (SHARE, "Raise steps and restarts until the figure stands still."),
    "random_noise_finds_errors": (NOISE, "Gradients do worse than chance: report Square, and find what hides them."),
    "dynamic_computation": (AUTOGRAD, "The model optimises while it answers: adapt the attack to its inner loop."),
}


class _EndsError(Exception):
    """The signs not yet measured cannot be; the message says why."""


def check(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    ids: Tensor,
    seed: int = 0,
    width: int,
    stop: Stop = lambda: False,
) -> tuple[list[Sign], Cost]:
    """Every sign in the order of `KINDS`, and what measuring them cost, on images `x` (n, c, h, w) of labels `y`.

    `ids` (n,) seed each row's noise. Once `stop` says so, the signs not yet measured stay so.
    """
    bench, signs, why = _Bench(model, x, y, threat, ids, seed, width, stop), {}, ""
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.manual_seed(seed)  # so that a model that draws numbers answers the next check in the same way
        try:
            for sign in _signs(bench):
                signs[sign.name] = sign
        except _EndsError as end:
            why = str(end)
    every = [signs[name] if name in signs else _sign(name, None, f"Not measured: {why}.") for name in KINDS]
    return every, Cost(bench.forward, bench.backward)


def _sign(name: str, measure: float | None, finding: str) -> Sign:
    threshold, advice = KINDS[name]
    return Sign(name, measure is not None and measure > threshold, measure, threshold, finding, advice)


class _Bench:
    """The sample, the ways to question the model about it, and the bill."""

    def __init__(
        self, model: Model, x: Tensor, y: Tensor, threat: Threat, ids: Tensor, seed: int, width: int, stop: Stop
    ) -> None:
        self.model, self.x, self.y, self.threat, self.ids, self.seed = model, x, y, threat, ids, seed
        self._width, self._stop = width, stop
        self.forward = self.backward = 0

    def _seed(self, stage: int) -> int:
        return self.seed + (stage << 32)  # so that no stage repeats what another has drawn

    def _fit(self, rows: int) -> int:
        return widths.narrower(rows, self._width)

    def hurry(self) -> None:
        """End here if there is no time left."""
        if self._stop():
            raise _EndsError("out of time")

    def rows(self, threat: Threat, stage: int = 0) -> Batch:
        """All rows as a batch."""
        key = noise.keys(self._seed(stage), self.ids, torch.zeros_like(self.ids))
        return Batch(self.x, self.y, torch.full_like(self.y, -1), key, threat)

    def judge(self, rows: Batch, points: Tensor) -> Judged:
        """What model and judge say of `points` (m, ...)."""
        self.hurry()
        self.forward += len(points) * passes(self.model)
        return replay(self.model, Judge(), rows, points, self._fit(len(points)))

    def search(
        self, attack: Attack, at: Tensor, stage: int, *, threat: Threat | None = None, restarts: int = 1
    ) -> Ledger:
        """What `attack` finds for the rows where `at` (n,) is true."""
        self.hurry()
        batch = self.rows(threat or self.threat, stage)
        ledger = Ledger(batch.threat, self.x, self.y, torch.zeros_like(self.y, dtype=torch.float64))
        table = at.nonzero().squeeze(1)
        goal, seed = batch.target[:, None], self._seed(stage)
        task = Task(batch, self.ids, goal, table, restarts, seed, closest=True, stop=self._stop)
        search(self.model, attack, Judge(), task, ledger, self._fit(len(table)))
        self.forward += int(ledger.forward.sum())
        self.backward += int(ledger.backward.sum())
        if ledger.unsettled:
            raise _EndsError("out of time")
        return ledger

    def gradients(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) bool: rows among `at` (n,) whose gradient says nothing, and those that have none to begin with."""
        self.hurry()
        dead, blind = torch.zeros_like(at), torch.zeros_like(at)
        for part in torch.split(at.nonzero().squeeze(1), self._width):
            dead[part], blind[part] = self._pull(part)
        return dead, blind

    def _pull(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """The same for the rows at `part` (m,), in one query; cross-entropy is asked where the margin is silent."""
        rows = self.rows(self.threat).take(part)
        self.forward += len(part) * passes(self.model)
        answer = ask(self.model, rows.x, Access.GRADIENT)
        blind = torch.zeros_like(part, dtype=torch.bool)
        blind[list(answer.failed)] = True
        said, dead = answer.prediction, torch.ones_like(blind)
        if said.logits is None or said.vjp is None:
            return dead, dead
        for loss in (losses.margin, losses.cross_entropy):
            leaf = said.logits.detach().nan_to_num().requires_grad_()
            with torch.enable_grad():
                (cotangent,) = torch.autograd.grad(loss(leaf, rows).sum(), leaf)
            self.backward += len(part) * passes(self.model)
            try:
                flat = said.vjp(cotangent, keep=loss is losses.margin).flatten(1)
            except RuntimeError as error:  # the logits hang on parameters only, not on the image
                if widths.out_of_memory(error):
                    raise
                return torch.ones_like(dead), torch.ones_like(dead)
            dead = dead & (blind | ~flat.isfinite().all(1) | (flat == 0).all(1))
            if not (dead & ~blind).any():
                break
        return dead, blind


def _signs(bench: _Bench) -> Iterator[Sign]:
    """The signs, cheapest first."""
    if len(bench.x) == 0:
        raise _EndsError("no row was given")
    batch = bench.rows(bench.threat)
    heard = [bench.judge(batch, bench.x) for _ in range(CALLS)]
    failed = {row: why for judged in heard for row, why in judged.failed.items()}
    answered = torch.ones_like(bench.y, dtype=torch.bool)
    answered[list(failed)] = False
    if not answered.any():
        raise _EndsError(f"the model has an answer for none of the {len(bench.x)} rows ({failed[min(failed)]})")
    yield _random_outputs(heard, answered)
    yield _probabilities(heard[0], answered)
    yield _dynamic_computation(bench, answered)
    clean = heard[0]
    if bench.model.access < Access.GRADIENT or clean.logits is None:
        raise _EndsError(f"the model gives {bench.model.access.name.lower()} access only, this takes gradients")
    table = answered & (clean.label == bench.y)
    if not table.any():
        raise _EndsError("the model reads none of the rows right")
    dead, blind = bench.gradients(table)
    share, n = _share(dead, table), int(table.sum())
    yield _sign("zero_gradient", share, f"{int(dead.sum())} of {n} rows have no gradient, or one of zeros or NaN.")
    yield _unbounded_attack_fails(bench, table, blind)
    if bench.threat.norm not in Sprint.norms:
        raise _EndsError(f"the attacks that this takes work in {', '.join(Sprint.norms)}, not in {bench.threat.norm}")
    yield from _in_the_ball(bench, table, blind, losses.margin(clean.logits, batch))


def _share(part: Tensor, whole: Tensor) -> float:
    return int((part & whole).sum()) / int(whole.sum())


def _random_outputs(heard: list[Judged], answered: Tensor) -> Sign:
    """Does the model say the same again? A label that changes counts as well as logits that do."""
    labels = torch.stack([judged.label[answered] for judged in heard])
    changing, measure = (labels != labels[0]).any(0), 0.0
    logits = [judged.logits[answered].double() for judged in heard if judged.logits is not None]
    unit = [torch.nn.functional.normalize(values, dim=1) for values in logits]
    for one, two in combinations(unit, 2):
        measure = max(measure, (one - two).norm(dim=1).max().item())
    finding = f"In {CALLS} calls on the same {labels.shape[1]} images {int(changing.sum())} labels changed"
    finding += f", and the logits over their length by up to {measure:.2g}." if unit else "."
    return _sign("random_outputs", max(measure, changing.double().mean().item()), finding)


def _probabilities(said: Judged, answered: Tensor) -> Sign:
    """Are the outputs on the simplex?"""
    if said.logits is None:
        return _sign("probabilities", None, "Not measured: the model gives labels only.")
    values = said.logits[answered].double()
    on = (values > -SIMPLEX).all(1) & ((values.sum(1) - 1).abs() < SIMPLEX)
    finding = f"The outputs of {int(on.sum())} of {len(on)} rows are probabilities: none below 0, and their sum is 1."
    return _sign("probabilities", on.double().mean().item(), finding)


def _dynamic_computation(bench: _Bench, answered: Tensor) -> Sign:
    """Does the model differentiate while it answers? Asked of the few rows with the smallest ids."""
    bench.hurry()
    table = answered.nonzero().squeeze(1)
    few = table[bench.ids[table].argsort()[:FEW]]
    bench.forward += len(few) * passes(bench.model)
    with _autograd_calls() as calls:
        ask(bench.model, bench.x[few], min(bench.model.access, Access.SCORE))
    finding = f"While it answered one query for scores, the model called autograd {len(calls)} times."
    return _sign("dynamic_computation", float(len(calls)), finding)


@contextmanager
def _autograd_calls() -> Iterator[list[str]]:
    """A list that grows by one with each backward pass that anybody starts.

    grad, backward and torch.func.grad all come down to the one engine: patched there, none escapes through a
    name that was imported earlier.
    """
    engine, calls = Variable._execution_engine, list[str]()

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(engine, name)

        def run_backward(self, *args: Any, **options: Any) -> Any:
            calls.append("run_backward")
            return engine.run_backward(*args, **options)

    Variable._execution_engine = Counting()  # type: ignore[assignment]  # it passes all else on
    try:
        yield calls
    finally:
        Variable._execution_engine = engine


def _unbounded_attack_fails(bench: _Bench, table: Tensor, blind: Tensor) -> Sign:
    """Does a row hold where any image is allowed? Then the attack failed, not the row (Carlini et al. 2019).

    In every norm a large enough ball is the same set, all images inside the bounds: the cube is as good as any.
    """
    low, high = bench.threat.bounds
    attack = Sprint(STEPS, start="given")  # far away from the image noise alone breaks most rows
    found = bench.search(attack, table & ~blind, 1, threat=Linf(high - low, bench.threat.bounds))
    held = table & ~found.found & ~found.failed
    finding = f"With every image inside the bounds allowed, {int(held.sum())} of {int(table.sum())} rows held."
    return _sign("unbounded_attack_fails", _share(held, table), finding)


def _in_the_ball(bench: _Bench, table: Tensor, blind: Tensor, clean: Tensor) -> Iterator[Sign]:
    """The signs that compare attacks with one another within eps; `clean` (n,) are the margins before any."""
    base = bench.search(Sprint(STEPS), table & ~blind, 0, restarts=STARTS)
    yield _success_falls_with_eps(bench, base.found, table)
    held = table & ~base.found & ~base.failed
    sign, climbed = _loss_still_climbing(bench, held & ~blind, clean)
    yield sign
    held = held & ~climbed
    more = bench.search(Sprint(2 * STEPS), held & ~blind, 2, restarts=STARTS)
    yield _witness("more_steps_still_help", f"{2 * STEPS} steps x {STARTS} other starts", more.found, held, table)
    held = held & ~more.found & ~more.failed
    if bench.threat.norm in FGSM.norms:
        one = bench.search(FGSM(), held & ~blind, 5)
        yield _witness("one_step_beats_iterative", "One step of FGSM", one.found, held, table)
    else:
        why = f"Not measured: fgsm works in {', '.join(FGSM.norms)}, not in {bench.threat.norm}."
        yield _sign("one_step_beats_iterative", None, why)
    yield _witness("random_noise_finds_errors", f"{DRAWS} draws of noise", _noise(bench, held), held, table)
    square = bench.search(Square(SQUARES, mixed=True), held, 6)
    yield _witness("black_box_beats_white_box", f"{SQUARES} steps of Square", square.found, held, table)


def _witness(name: str, who: str, broke: Tensor, held: Tensor, table: Tensor) -> Sign:
    """A sign whose measure is the share of all rows that `who` broke after gradients had not."""
    n, left = int(table.sum()), int(held.sum())
    rows = number_of(left, "row")
    finding = f"{who} broke {int(broke.sum())} of the {rows} (of {n}) that no gradient attack before had broken."
    if not left:
        finding = f"No row was left to break: gradient attacks had broken all {n}."
    return _sign(name, _share(broke, table), finding)


def _success_falls_with_eps(bench: _Bench, fell: Tensor, table: Tensor) -> Sign:
    """Does a row that fell at eps hold at twice that? The smaller ball is inside the larger one."""
    twice = replace(bench.threat, eps=2 * bench.threat.eps)
    again = bench.search(Sprint(STEPS), fell, 3, threat=twice, restarts=STARTS)
    held = fell & ~again.found & ~again.failed
    finding = (
        f"Of {int(fell.sum())} rows that fell at eps {bench.threat.eps:.4g}, {int(held.sum())} held at twice it."
    )
    return _sign("success_falls_with_eps", _share(held, table), finding)


def _loss_still_climbing(bench: _Bench, held: Tensor, clean: Tensor) -> tuple[Sign, Tensor]:
    """The part of the rise of the margin that the last steps brought, mean over `held`; and whom they broke.

    The margin is the best so far, as Pintor et al. have it. PGD with a fixed step goes the same way in the
    shorter run as in the longer; from the image itself, since a random start has way to make up.
    """
    size = STRIDE * bench.threat.eps
    before = bench.search(PGD(BEFORE, size, False, "margin"), held, 4)
    left = held & ~before.found & ~before.failed
    after = bench.search(PGD(BEFORE + LAST, size, False, "margin"), left, 4)
    gone = before.found | before.failed | after.found | after.failed
    start, early, late = clean.double(), before.gap.double(), after.gap.double().masked_fill(after.found, 0.0)
    left = left & ~after.failed & (late > start)
    if not left.any():
        return _sign("loss_still_climbing", None, "Not measured: no row held on which the margin rose at all."), gone
    early = torch.maximum(early, start)
    rise = ((late - early) / (late - start))[left].tolist()
    measure = math.fsum(rise) / len(rise)  # fsum rounds once, at the end: the order of the rows does not matter
    rows, steps = number_of(len(rise), "row"), BEFORE + LAST
    finding = f"On {rows} the last {LAST} of {steps} steps brought {measure:.1%} of the rise."
    return _sign("loss_still_climbing", measure, finding), gone


def _noise(bench: _Bench, held: Tensor) -> Tensor:
    """(n,) bool: the rows among `held` that a random legal point breaks."""
    rows, broke = bench.rows(bench.threat, 7), torch.zeros_like(held)
    for draw in range(DRAWS):
        left = (held & ~broke).nonzero().squeeze(1)
        if len(left) == 0:
            break
        part = rows.take(left)
        broke[left] = bench.judge(part, part.threat.sample(part.x, part.key, draw)).hit
    return broke
