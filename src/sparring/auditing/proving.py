"""The search for proofs: each method on the rows that look nearest to one, in rounds, for as long as rounds pay.

A round takes four times the rows of the one before, and is the last where it proves too few of them: a net for
which nothing can be proved costs 16 rows of a method. Which rows are next follows from what was found of all rows in
the rounds before, and a round is cut into the same chunks whenever it is taken up, so a run that is cut short ends
with the same proofs and bounds. Nothing hangs on the clock.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sparring.attacks.sprint import Sprint
from sparring.auditing.cascade import Stage
from sparring.auditing.evidence import Shard
from sparring.auditing.hunt import Front, Hunt
from sparring.auditing.provers import Proof, Provable, provable
from sparring.auditing.search import Search
from sparring.auditing.standing import CERTIFIED, HELD, STATES
from sparring.core.errors import SparringError
from sparring.core.model import Model
from sparring.core.threat import Threat

VERSION = 1  # raised whenever what is tried changes
PREFIX = "proof: "
PILOT, GROWTH = 16, 4  # rows of the first round, and how many times as many each further one takes
SPOT = 64  # certified rows that are attacked all the same
_SALT = 70_000_000
_ALL = 10**9


@dataclass(frozen=True)
class Effort:
    """How much of one method."""

    method: str
    rows: int = _ALL  # at most, of those that came nearest to a proof
    paying: float = 1 / 16  # of a round's rows it must prove for the next round to be played
    chunk: int = 64  # rows at once


CHEAP = Effort("crown-ibp")
EXACT = Effort("linear", paying=0.0)  # of a linear model, which costs nothing and leaves nothing open
EFFORTS = {
    "quick": (CHEAP,),
    "standard": (CHEAP, Effort("crown"), Effort("alpha-crown", 128, 1 / 8, 16)),
    "deep": (CHEAP, Effort("crown", paying=1 / 64), Effort("alpha-crown", 4096, 1 / 16, 16)),
}
SCREENED = ("quick",)  # profiles too short to look for proofs where a first attack breaks half of a sample


def planned(profile: str) -> dict[str, Any]:
    """What a plan says of the proofs that a profile looks for."""
    return {"version": VERSION, "effort": [asdict(effort) for effort in EFFORTS[profile]]}


class Prover:
    """The search for proofs of one run, from wherever it stands."""

    def __init__(self, search: Search, model: Model) -> None:
        self.search, self.model = search, model
        self.number = 0  # of the last stage played
        self._provable: Provable | None = None

    def work(self, efforts: tuple[Effort, ...], *, screened: bool = False) -> bool:
        """Play all rounds of all methods; returns whether there was time for them."""
        if not self._worth(screened):
            return not self.search.setting.stop()
        if (efforts := self._fitting(efforts)) is None:
            return not self.search.setting.stop()
        return all(self.ladder(effort) for effort in efforts)

    def _worth(self, screened: bool) -> bool:
        """Are there rows to prove, and do most of a sample hold against a first attack?"""
        search, held = self.search, self.search.standing.held
        if not len(held):
            return False
        if not screened:
            return True
        by_id = held[search.standing.ids[held].argsort()]
        sample = by_id[torch.linspace(0, len(by_id) - 1, min(PILOT, len(by_id))).long()]
        self.number += 1
        stage = Stage(self.number, "sprint on a sample", len(sample), Sprint(search.plan.opening, loss="log_odds"))
        search.take_up(self.number)
        done = search.play(stage, sample)
        return done and 2 * search.standing.fell[self.number] < len(sample)

    def _fitting(self, efforts: tuple[Effort, ...]) -> tuple[Effort, ...] | None:
        """The methods for this model, or None where there is none; the run remembers which, and why."""
        run = self.search.run
        told = run.figures("proofs")
        if told is None:
            began = time.monotonic()
            found = self._open()
            linear = isinstance(found, Provable) and found.linear
            told = {"why": found if isinstance(found, str) else None, "linear": linear}
            run.record("proofs", told | {"seconds": time.monotonic() - began})
        if told["why"] is not None:
            return None
        return (EXACT,) if told["linear"] else efforts

    def _open(self) -> Provable | str:
        """The model traced, once, or why it cannot be."""
        if self._provable is None:
            search = self.search
            shape = tuple(search.images.x.shape[1:])
            found = provable(self.model, search.setting.threat, shape, search.device)
            if isinstance(found, str):
                return found
            self._provable = found
        return self._provable

    def prove(self, method: str, at: Tensor, threat: Threat) -> Proof:
        """What `method` proves of the rows at `at` (m,), on the CPU."""
        search, found = self.search, self._open()
        if isinstance(found, str):
            raise SparringError(f"{found} (it could be proved things of when this run was begun)")
        proof = found.prove(method, search.to(search.images.x[at]), search.to(search.images.y[at]), threat)
        return proof._map(lambda _, tensor: tensor.cpu())

    def ladder(self, effort: Effort) -> bool:
        """The rounds of one method; False when time ran out."""
        standing, met, size = self.search.standing, torch.zeros_like(self.search.standing.moved), PILOT
        while effort.rows > (count := int(met.sum())):
            left = standing.held[~met[standing.held]]
            if not len(left):
                return True
            chosen = _likeliest(standing.bound[left], standing.gap[left], standing.ids[left])
            chosen = left[chosen[: min(size, effort.rows - count)]]
            met[chosen] = True
            self.number += 1
            self.search.take_up(self.number)
            if not self._round(effort, chosen):
                return False
            if standing.proved[self.number] < effort.paying * len(chosen):
                return True
            size *= GROWTH
        return True

    def _round(self, effort: Effort, chosen: Tensor) -> bool:
        search = self.search
        name = PREFIX + effort.method
        parts = torch.split(chosen, effort.chunk)
        for number, at in enumerate(parts):
            search.tell(name, number * effort.chunk, len(chosen))
            if (search.standing.weighed[at] == self.number).all():
                continue
            if search.setting.stop():
                return False
            search.began = time.monotonic()
            proof = self.prove(effort.method, at, search.setting.threat)
            state = torch.where(proof.certified, CERTIFIED, HELD).tolist()
            nothing = [0] * len(at)
            search.commit(
                Shard(
                    stage=self.number,
                    name=name,
                    ids=search.images.ids[at].tolist(),
                    state=[STATES[code] for code in state],
                    gap=[],
                    forward=nothing,
                    backward=nothing,
                    bound=proof.bound.tolist(),
                    guard=proof.guard.tolist(),
                )
            )
        search.tell(name, len(chosen), len(chosen))
        return True


def _likeliest(bound: Tensor, gap: Tensor, ids: Tensor) -> Tensor:
    """The order in which rows are tried: by the best bound so far, then by how far from an error they are."""
    order = ids.argsort()
    order = order[gap[order].argsort(stable=True)]
    return order[bound[order].argsort(descending=True, stable=True)]


def spot_check(search: Search) -> bool:
    """Attack some certified rows all the same, once; False when time ran out, `SparringError` when one falls."""
    standing, run = search.standing, search.run
    proved = ((standing.state == CERTIFIED) & (standing.proof >= 0)).nonzero().squeeze(1)
    if run.figures("spot_check") or not len(proved):
        return True
    if search.setting.stop():
        return False
    began = time.monotonic()
    proved = proved[standing.ids[proved].argsort()]
    at = proved[torch.linspace(0, len(proved) - 1, min(SPOT, len(proved))).long()]
    search.tell("spot check", 0, len(at))
    x = search.images.x[at]
    far = torch.full((len(at),), -torch.inf)
    front = Front(x, search.images.y[at], search.images.ids[at], x, far).to(search.device)
    hunt = Hunt(search.setting, front)
    hunt.play(Sprint(search.plan.opening, loss="log_odds"), _SALT)
    for row in hunt.found.nonzero().squeeze(1).tolist():
        contradict(search, int(at[row]), hunt.best[row])
    if hunt.stopped:
        return False
    spent = {"forward": int(hunt.forward.sum()), "backward": int(hunt.backward.sum())}
    run.record("spot_check", {"rows": len(at), **spent, "seconds": time.monotonic() - began})
    return True


def contradict(search: Search, place: int, image: Tensor) -> None:
    """End the run: an adversarial image (c, h, w) lies where its row was proved to have none."""
    standing, run = search.standing, search.run
    row, shard = int(standing.ids[place]), standing.names[int(standing.proof[place])]
    proof = standing.stages[int(standing.stage[place])]
    told = {"id": row, "proof": proof, "bound": float(standing.bound[place]), "shard": f"evidence/rows/{shard}.json"}
    run.record("contradiction", told, {"x": search.images.x[place], "adversarial": image})
    raise SparringError(
        f"row {row} was proved robust ({proof}, bound {told['bound']:.3g}, in {told['shard']}), and the image in "
        f"evidence/contradiction.safetensors lies within {search.setting.threat.describe()} and is read wrong: "
        f"one of the two is a fault in sparring; no figure of {run.path} can be trusted, please report it"
    )


def refuted(search: Search, at: Tensor, images: Tensor) -> None:
    """`contradict` where one of the legal adversarial `images` (m, c, h, w) is of a row at `at` (m,) with a proof."""
    standing = search.standing
    for place, image in zip(at.tolist(), images, strict=True):
        if standing.state[place] == CERTIFIED and standing.proof[place] >= 0:
            contradict(search, place, image)


