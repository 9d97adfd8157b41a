"""The search for small distances, once the verdicts are in: every row that the model got right meets it.

Attacks that minimise follow each other as further stages, each with shards of its own; what a stage finds counts
where it is nearer than all before. A point that turns up inside the ball breaks a row that held.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparring.attacks.ddn import DDN
from sparring.attacks.fab import FAB
from sparring.attacks.fmn import FMN
from sparring.attacks.hopskipjump import HopSkipJump
from sparring.attacks.square import Square
from sparring.auditing.closer import Closer, Onward, Shrink
from sparring.auditing.evidence import Shard
from sparring.auditing.hunt import JUDGE, WIDTH, Setting
from sparring.auditing.proving import refuted
from sparring.auditing.search import Search
from sparring.auditing.standing import BROKEN, CERTIFIED, HELD, STATES
from sparring.core.attack import Attack
from sparring.core.batch import Batch
from sparring.core.model import fresh, passes
from sparring.core.threat import Threat
from sparring.engine.loop import Task, search
from sparring.engine.outcome import Ledger

VERSION = 1  # raised whenever what is tried changes
_SALT = 80_000_000
_STEPS = 40  # of gradients a row, for each dig that the profile grants
_RUNGS = (8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125)  # of the audited eps, at which Square looks for distances
_BLIND = 600  # queries of HopSkipJump for each dig that the profile grants, where there are no gradients

_SOME = torch.finfo(torch.float64).max  # below it are all rows that have a distance


@dataclass(frozen=True)
class Measure:
    """One attack, on every row or on those that have a distance above `above` and at most `below`."""

    name: str
    attack: Attack
    above: float = 0.0
    below: float = torch.inf
    eps: float | None = None  # of the ball in which to look; None: as far as the bounds go


def measures(setting: Setting, work: float, most: float) -> list[Measure]:
    """What is tried in turn, for the `work` of a profile, with `most` the largest distance possible."""
    norm, (low, high) = setting.threat.norm, setting.threat.bounds
    eps = setting.threat.eps or most / 32
    if not setting.gradients:
        return _blind(norm, eps, round(_BLIND * work), round(10 * work) + 20)
    steps, size = max(24, round(_STEPS * work)), high - low
    few = steps // 6
    opening = Measure("nearest: fmn", FMN(few, step_size=size))
    if norm == "l2":
        opening = Measure("nearest: ddn", DDN(few, step_size=size, radius=eps))
    # In L2 and L1 a ball as wide as in the verdicts' tries: gradients that vanish within return beyond it.
    closer = Closer(steps - 2 * few, eps, wide=WIDTH[norm])
    return [opening, Measure("nearest: fab", Onward(FAB(few))), Measure("nearest: closer", closer)]


def _blind(norm: str, eps: float, queries: int, steps: int) -> list[Measure]:
    """Square at one eps after the other, each on the rows that fell at the one before; then labels."""
    found = []
    steps = steps if norm in HopSkipJump.norms else 4 * steps  # else nobody comes after it
    for place, rung in enumerate(_RUNGS):
        below = torch.inf if place == 0 else _RUNGS[place - 1] * eps * (1 + 1e-5)
        square = Square(steps=steps, p=0.3, mixed=True)
        found.append(Measure(f"nearest: square at {rung * eps:.3g}", square, rung * eps, below, rung * eps))
    found.append(Measure("nearest: shrink", Shrink(), below=_SOME))
    if norm in HopSkipJump.norms:
        found.append(Measure("nearest: hopskipjump", HopSkipJump(queries)))
    return found


def measure(work: Search) -> bool:
    """Go through all measures on every row that was right; returns whether there was time for all of them."""
    standing, setting = work.standing, work.setting
    last = max(standing.stages, default=0)
    most = setting.threat.farthest(work.images.x)
    for number, step in enumerate(measures(setting, work.plan.work, most), last + 1):
        right = (standing.state == HELD) | (standing.state == BROKEN) | (standing.state == CERTIFIED)
        met = (right & (standing.reach > step.above) & (standing.reach <= step.below)).nonzero().squeeze(1)
        work.take_up(number)
        work.rate = 0.0
        while len(left := met[standing.measured[met] < number]):
            work.tell(step.name, len(met) - len(left), len(met))
            if setting.stop():
                return False
            _approach(work, step, number, work.chunks(left, 1)[0], most)
    return True


def _approach(work: Search, step: Measure, number: int, at: Tensor, most: float) -> None:
    """One measure on the rows `at`: store what is nearer than before, have it judged from there, and say so."""
    standing, setting = work.standing, work.setting
    clean, y, ids = work.images.x[at], work.to(work.images.y[at]), work.images.ids[at]
    x, start = work.to(clean), work.to(standing.nearest(at, clean, work.evidence))
    far = replace(setting.threat, eps=most)
    ball = far if step.eps is None else replace(far, eps=step.eps)
    ledger = _play(setting, step.attack, ball, (x, y, work.to(ids), start))
    settled = torch.ones(len(at), dtype=torch.bool)
    settled[list(ledger.unsettled)] = False
    near = (settled & (ledger.distance.cpu() < standing.reach[at])).nonzero().squeeze(1)
    forward, backward = ledger.forward.cpu(), ledger.backward.cpu()
    name, there = work.evidence.fresh(number), work.to(near)
    confirmed, said = work.confirm(name, ids[near], x[there], y[there], ledger.best[there], far)
    forward[near] += 2 * passes(fresh(setting.model))
    near, there = near[confirmed], there[work.to(confirmed)]
    state = standing.state[at]
    inside = setting.threat.contains(ledger.best[there], x[there]).cpu()
    refuted(work, at[near[inside]], ledger.best[there][work.to(inside)])
    state[near[inside & (state[near] == HELD)]] = BROKEN
    rows, rest = settled.nonzero().squeeze(1), (~settled).nonzero().squeeze(1)

    spent = {"ids": ids, "forward": forward, "backward": backward}

    def told(part: Tensor) -> dict[str, Any]:
        return {key: values[part].tolist() for key, values in spent.items()}

    states = [STATES[code] for code in state[rows].tolist()]
    shard = Shard(number, step.name, **told(rows), state=states, gap=[], **said, nearer=ids[near].tolist())
    work.commit(shard, name)
    if len(rest):
        work.commit(Shard(number, step.name, **told(rest), state=[], gap=[], complete=False))


def _play(setting: Setting, attack: Attack, threat: Threat, rows: tuple[Tensor, Tensor, Tensor, Tensor]) -> Ledger:
    """Run one attack on rows (images, labels, ids, points to begin at)."""
    x, y, ids, start = rows
    aim, each = torch.full_like(y, -1), torch.arange(len(y), device=y.device)
    ledger = Ledger(threat, x, y, torch.zeros_like(y, dtype=torch.float64))
    task = Task(
        Batch(x, y, aim, aim, threat, start),
        ids,
        aim[:, None],
        each,
        seed=setting.seed * 1_000_003 + _SALT,
        eight_bit=setting.eight_bit,
        stop=setting.stop,
        known=setting.known,
    )
    search(setting.model, attack, JUDGE, task, ledger, setting.width)
    return ledger
