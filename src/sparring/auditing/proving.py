"""The search for proofs: each method on the rows that look nearest to one, in rounds, for as long as rounds pay.

A round takes four times the rows of the one before, and is the last where it proves too few of them: a net for
which nothing can be proved costs a few rows of each method. Which rows are next follows from what was found of all
rows in the rounds before, and a round is cut into the same chunks whenever it is taken up, so a run that is cut short
ends with the same proofs and bounds. Nothing hangs on the clock.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sparring.auditing.cascade import Stage, opening
from sparring.auditing.evidence import Shard
from sparring.auditing.hunt import Front, Hunt
from sparring.auditing.proofs import PREFIX, SPOT_CHECKS
from sparring.auditing.provers import NODES, Proof, Provable, hopeless, provable
from sparring.auditing.search import Search
from sparring.auditing.standing import BROKEN, CERTIFIED, HELD, STATES
from sparring.certificates.graph import OutOfTime
from sparring.core.errors import SparringError
from sparring.core.model import Model
from sparring.core.threat import Threat

VERSION = 4  # raised whenever what is tried changes
GROWTH = 4  # times as many rows as in the round before
SAMPLE = 16  # rows that the first attack of a short profile meets before anything is proved
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
    pilot: int = 16  # rows of the first round
    nodes: int = NODES  # subproblems of branch and bound for each row


CHEAP = Effort("crown-ibp", pilot=256)  # whose bounds tell which rows are worth more, also where they prove none
EXACT = Effort("linear", paying=0.0)  # of a linear model, which costs nothing and leaves nothing open
EFFORTS: dict[str, tuple[Effort, ...]] = {  # before anything is attacked
    "quick": (CHEAP,),
    "standard": (CHEAP, Effort("crown")),
    "deep": (CHEAP, Effort("crown", paying=1 / 64)),
}
LAST: dict[str, tuple[Effort, ...]] = {  # on what the attacks leave; alpha-CROWN is how branch and bound begins
    "quick": (),
    "standard": (Effort("branch", 128, 1 / 8, 16, pilot=4, nodes=64),),
    "deep": (Effort("branch", 4096, 1 / 16, 16, pilot=8, nodes=64), Effort("branch", 4096, 1 / 16, 4, pilot=8)),
}
SCREENED = ("quick",)  # profiles too short to look for proofs where a first attack breaks half of a sample


def planned(profile: str) -> dict[str, Any]:
    """What a plan says of the proofs that a profile looks for."""
    return {"version": VERSION, "effort": [asdict(effort) for effort in EFFORTS[profile] + LAST[profile]]}


class Prover:
    """The search for proofs of one run, from wherever it stands."""

    def __init__(self, search: Search, model: Model) -> None:
        self.search, self.model = search, model
        self.number = 0  # of the last stage played
        self._provable: Provable | None = None

    def work(self, efforts: tuple[Effort, ...], *, screened: bool = False) -> bool:
        """Play all rounds of all methods; returns whether there was time for them."""
        chosen = self._fitting(efforts) if self._worth(screened) else ()
        return all(self.ladder(effort) for effort in chosen) and not self.search.setting.stop()

    def _worth(self, screened: bool) -> bool:
        """Are there rows to prove, and do most of a sample hold against a first attack?"""
        search, held = self.search, self.search.standing.held
        why = hopeless(self.model, search.setting.threat)
        if why is not None and search.run.figures("proofs") is None:
            search.run.record("proofs", {"why": why, "linear": False, "seconds": 0.0})
        if why is not None or not len(held) or not screened:
            return why is None and bool(len(held))
        by_id = held[search.standing.ids[held].argsort()]
        sample = by_id[torch.linspace(0, len(by_id) - 1, min(SAMPLE, len(by_id))).long()]
        self.number += 1
        attack = opening(search.plan, search.setting.gradients)
        search.take_up(self.number)
        done = search.play(Stage(self.number, f"{attack.name} on a sample", len(sample), attack), sample)
        return done and 2 * search.standing.fell[self.number] < len(sample)

    def _fitting(self, efforts: tuple[Effort, ...]) -> tuple[Effort, ...]:
        """The methods for this model, none where nothing can be proved; the run remembers which, and why."""
        run = self.search.run
        told = run.figures("proofs")
        if told is None:
            began = time.monotonic()
            found = self._open()
            linear = isinstance(found, Provable) and found.linear
            told = {"why": found if isinstance(found, str) else None, "linear": linear}
            run.record("proofs", told | {"seconds": time.monotonic() - began})
        if told["why"] is not None:
            return ()
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

    def prove(self, method: str, at: Tensor, threat: Threat, nodes: int = NODES) -> Proof:
        """What `method` proves of the rows at `at` (m,), on the CPU; `OutOfTime` when the run's time is over."""
        search, found = self.search, self._open()
        if isinstance(found, str):
            raise SparringError(f"{found} (it could be proved things of when this run was begun)")
        x, y = search.to(search.images.x[at]), search.to(search.images.y[at])
        proof = found.prove(method, x, y, threat, nodes, search.setting.stop)
        return proof._map(lambda _, tensor: tensor.cpu())

    def ladder(self, effort: Effort) -> bool:
        """The rounds of one method; False when time ran out."""
        standing, met, size = self.search.standing, torch.zeros_like(self.search.standing.moved), effort.pilot
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
        for number, at in enumerate(torch.split(chosen, effort.chunk)):
            search.tell(name, number * effort.chunk, len(chosen))
            if (search.standing.weighed[at] == self.number).all():
                continue
            search.began = time.monotonic()
            try:
                proof = self.prove(effort.method, at, search.setting.threat, effort.nodes)
            except OutOfTime:
                return False
            self._settle(name, at, proof)
        search.tell(name, len(chosen), len(chosen))
        return True

    def _settle(self, name: str, at: Tensor, proof: Proof) -> None:
        """Store a method's word on the rows `at` (m,); an image that it says breaks one is judged from the disk."""
        search = self.search
        ids, shard = search.images.ids[at], search.evidence.fresh(self.number)
        state = torch.where(proof.certified, CERTIFIED, HELD)
        forward = torch.zeros_like(at)
        won = proof.broken.nonzero().squeeze(1)
        x, y = search.to(search.images.x[at[won]]), search.to(search.images.y[at[won]])
        confirmed, said = search.confirm(shard, ids[won], x, y, search.to(proof.worst[won]), search.setting.threat)
        forward[won] += 2
        state[won[confirmed]] = BROKEN
        search.commit(
            Shard(
                stage=self.number,
                name=name,
                ids=ids.tolist(),
                state=[STATES[code] for code in state.tolist()],
                gap=[],
                forward=forward.tolist(),
                backward=[0] * len(at),
                bound=proof.bound.tolist(),
                guard=proof.guard.tolist(),
                **said,
            ),
            shard,
        )


def _likeliest(bound: Tensor, gap: Tensor, ids: Tensor) -> Tensor:
    """The order in which rows are tried: by the best bound so far, then by how far from an error they are."""
    order = ids.argsort()
    order = order[gap[order].argsort(stable=True)]
    return order[bound[order].argsort(descending=True, stable=True)]


def spot_check(search: Search, section: str) -> bool:
    """Attack some certified rows all the same, once; False when time ran out, `SparringError` when one falls.

    A later one looks at rows that were proved after the one before.
    """
    standing, run = search.standing, search.run
    proved = ((standing.state == CERTIFIED) & (standing.proof >= 0)).nonzero().squeeze(1)
    earlier = [told["last"] for name in SPOT_CHECKS if name != section and (told := run.figures(name))]
    proved = proved[standing.stage[proved] > max(earlier, default=0)]
    if run.figures(section) or not len(proved):
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
    hunt.play(opening(search.plan, search.setting.gradients), _SALT)
    won = hunt.found.cpu()
    refuted(search, at[won], hunt.best[hunt.found])
    if hunt.stopped:
        return False
    spent = {"forward": int(hunt.forward.sum()), "backward": int(hunt.backward.sum())}
    last = int(standing.stage[proved].max())
    run.record(section, {"rows": len(at), **spent, "seconds": time.monotonic() - began, "last": last})
    return True


def contradict(search: Search, place: int, image: Tensor) -> None:
    """End the run: an adversarial image (c, h, w) lies where its row was proved to have none."""
    standing, run = search.standing, search.run
    row, number = int(standing.ids[place]), int(standing.proof[place])
    proof, bound = standing.stages[int(standing.stage[place])], float(standing.bound[place])
    shard = f"evidence/rows/{standing.names[number]}.json" if number >= 0 else "evidence/rows, of its radius"
    distance = float(search.setting.threat.distance(image[None].cpu(), search.images.x[place][None]))
    told = {"id": row, "proof": proof, "bound": bound, "shard": shard, "distance": distance}
    run.record("contradiction", told, {"x": search.images.x[place], "adversarial": image})
    raise SparringError(
        f"row {row} was proved robust ({proof}, bound {bound:.3g}, in {shard}), and the image in "
        f"evidence/contradiction.safetensors, {distance:.6g} from it, is read wrong, twice: one of the two "
        f"is a fault in sparring; no figure of {run.path} can be trusted, please report it"
    )


def refuted(search: Search, at: Tensor, images: Tensor) -> None:
    """`contradict` where one of the legal adversarial `images` (m, c, h, w) is of a row at `at` (m,) with a proof.

    Only what the model says again counts: one that answers now this and now that can contradict any proof.
    """
    standing = search.standing
    proved = ((standing.state[at] == CERTIFIED) & (standing.proof[at] >= 0)).nonzero().squeeze(1)
    if not len(proved):
        return
    x, y = search.to(search.images.x[at[proved]]), search.to(search.images.y[at[proved]])
    again = search.judge(x, y, images[search.to(proved)], search.setting.model, search.setting.threat).hit.cpu()
    for row in proved[again].tolist():
        contradict(search, int(at[row]), images[row])
