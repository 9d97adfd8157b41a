"""The audit: a verdict for every image, with its witness, and with a plan that a crash does not lose."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparring.auditing.cascade import Cascade, Profile, Stage, nearest
from sparring.auditing.evidence import Evidence, Shard, as_json
from sparring.auditing.hunt import JUDGE, Front, Hunt, Setting
from sparring.auditing.run import Run
from sparring.auditing.standing import BROKEN, CERTIFIED, ERROR, HELD, MISCLASSIFIED, STATES, WAITING, Standing
from sparring.core.batch import Batch, per_row
from sparring.core.model import Access, Model, fresh, passes
from sparring.core.threat import Threat
from sparring.data.images import Images
from sparring.engine.replay import Judged, replay

_PIXELS = 2**20  # numbers in the images of one chunk, at most
_SECONDS = 5.0  # what a chunk should take: what a crash may cost

Tell = Callable[[str, int, int], None]  # what is going on, rows done, of how many


@dataclass
class Search:
    """The search for the verdicts of one run, from wherever it stands."""

    setting: Setting
    plan: Profile
    images: Images
    run: Run
    tell: Tell = lambda *_: None

    def __post_init__(self) -> None:
        """Take up what is on disk."""
        self.evidence, self.standing = Evidence(self.run), Standing(self.images.ids, self.images.y)
        self.rate = 0.0  # rows a second in the last chunk
        self.began = time.monotonic()  # when that was begun
        self._later: dict[int, list[tuple[str, Shard]]] = {}
        for name, shard in self.evidence.shards():
            self._later.setdefault(shard.stage, []).append((name, shard))

    def work(self) -> bool:
        """Go through all stages; returns whether there was time for all of them."""
        return self.look() and self.attack()

    def look(self) -> bool:
        """Stage 0: what the model says of the untouched images; False when time ran out."""
        self.take_up(0)
        return self._clean()

    def attack(self, before: int = 0) -> bool:
        """All stages of attacks, after `before` others; False when time ran out."""
        cascade = Cascade(self.plan, self.setting.threat.norm, self.setting.gradients, before=before)
        fell = 0
        while (stage := cascade.next(len(self.standing.held), fell)) is not None:
            held = self.standing.held
            chosen = held[nearest(self.standing.gap[held], self.standing.ids[held], stage.rows)]
            self.take_up(stage.number)
            if not self.play(stage, chosen):
                return False
            fell = self.standing.fell[stage.number]
            self.evidence.forget(self.standing.stale())
        self.evidence.forget(set(self.standing.names))
        return True

    def take_up(self, number: int) -> None:
        """Apply the shards that a stage has on disk."""
        for name, shard in self._later.pop(number, []):
            self.standing.apply(name, shard)

    def chunks(self, chosen: Tensor, widening: int) -> list[Tensor]:
        """The next rows to work on, few enough for memory and for a crash to cost little."""
        fits = _PIXELS // max(1, self.images.x[0].numel()) // widening
        self.began = time.monotonic()
        soon = int(self.rate * _SECONDS) if self.rate else self.setting.width
        return list(torch.split(chosen, max(1, min(max(fits, 1), max(soon, self.setting.width)))))

    def _clean(self) -> bool:
        while len(waiting := (self.standing.state == WAITING).nonzero().squeeze(1)):
            if self.setting.stop():
                return False
            at = self.chunks(waiting, 1)[0]
            self._look(at)
            self.tell("clean images", len(self.images) - len(waiting) + len(at), len(self.images))
        return True

    def _look(self, at: Tensor) -> None:
        x, y = self.to(self.images.x[at]), self.to(self.images.y[at])
        judged = self.judge(x, y, x, self.setting.model, self.setting.threat)
        state = torch.where(judged.hit, MISCLASSIFIED, HELD).cpu()
        if not self.setting.threat.eps:  # the ball holds the clean image alone, and that was looked at
            state[state == HELD] = CERTIFIED
        state[list(judged.failed)] = ERROR
        gap = torch.zeros(len(at))
        if judged.logits is not None:
            aim = torch.full_like(y, -1)
            rows = Batch(x, y, aim, aim, self.setting.threat)
            gap = JUDGE.shortfall(rows, judged.logits).cpu().nan_to_num(0.0)
        ids = self.images.ids[at]
        self.commit(
            Shard(
                stage=0,
                name="clean images",
                ids=ids.tolist(),
                state=[STATES[code] for code in state.tolist()],
                gap=gap.tolist(),
                forward=[passes(self.setting.model)] * len(at),
                backward=[0] * len(at),
                errors={str(int(ids[row])): why for row, why in judged.failed.items()},
                label=judged.label.tolist(),
                truth=self.images.y[at].tolist(),
                confidence=[as_json(value) for value in judged.score.tolist()],
            )
        )

    def play(self, stage: Stage, chosen: Tensor) -> bool:
        """One stage on the rows `chosen` before it began; False when time ran out."""
        while True:
            left = chosen[self.standing.stage[chosen] < stage.number]
            self.tell(stage.name, len(chosen) - len(left), len(chosen))
            if not len(left):
                return True
            if self.setting.stop():
                return False
            at = self.chunks(left, stage.chains)[0]
            x = self.images.x[at]
            best = self.standing.closest(at, x, self.evidence)
            front = Front(x, self.images.y[at], self.images.ids[at], best, self.standing.gap[at])
            hunt = stage.hunt(self.setting, front.to(self.device))
            self._settle(stage, at, hunt)

    def _settle(self, stage: Stage, at: Tensor, hunt: Hunt) -> None:
        """Store what a hunt found, judge it again from there, and write its word."""
        name, ids = self.evidence.fresh(stage.number), self.images.ids[at]
        won = (hunt.found | self._close(hunt)).cpu().nonzero().squeeze(1)
        there = self.to(won)
        confirmed, said = self.confirm(
            name, ids[won], hunt.x[there], hunt.y[there], hunt.best[there], self.setting.threat
        )
        hunt.forward[there] += 2 * passes(fresh(self.setting.model))
        moved = won[~confirmed & hunt.found.cpu()[won]]
        won = won[confirmed]
        state = torch.full((len(at),), HELD)
        state[won] = BROKEN
        state[[row for row in hunt.failed if state[row] != BROKEN]] = ERROR
        gap = hunt.gap.cpu()
        gap[moved], gap[won] = -1e-30, 0.0  # as close as can be, and yet not there
        complete = torch.full((len(at),), not hunt.stopped) | (state != HELD)
        held = (state == HELD) & complete
        if held.any():
            self.evidence.store_work(name, ids[held], hunt.best.cpu()[held])
        rows = complete.nonzero().squeeze(1)
        place = {int(row): number for number, row in enumerate(won.tolist())}
        forward, backward = hunt.forward.cpu(), hunt.backward.cpu()
        broken = [place[row] for row in rows.tolist() if row in place]
        self.commit(
            Shard(
                stage=stage.number,
                name=stage.name,
                ids=ids[rows].tolist(),
                state=[STATES[code] for code in state[rows].tolist()],
                gap=gap[rows].tolist(),
                forward=forward[rows].tolist(),
                backward=backward[rows].tolist(),
                moved=ids[moved].tolist(),
                errors={str(int(ids[row])): why for row, why in hunt.failed.items() if state[row] == ERROR},
                **_chosen(said, broken),
            ),
            name,
        )
        rest = (~complete).nonzero().squeeze(1)
        if len(rest):
            told: dict[str, Any] = {
                "ids": ids[rest].tolist(),
                "forward": forward[rest].tolist(),
                "backward": backward[rest].tolist(),
            }
            self.commit(Shard(stage.number, stage.name, **told, state=[], gap=[], complete=False))

    def _close(self, hunt: Hunt) -> Tensor:
        """(m,) bool: rows whose closest point is judged, too, since it is other draws that decide.

        What does not quite fool the mean of the search's draws may well fool that of those.
        """
        model = self.setting.model
        close = (hunt.best != hunt.x).flatten(1).any(1) & (fresh(model) != model)
        close[list(hunt.failed)] = False
        return close

    def confirm(
        self, name: str, ids: Tensor, x: Tensor, y: Tensor, exact: Tensor, limit: Threat
    ) -> tuple[Tensor, dict[str, Any]]:
        """Judge images `exact` (m, ...) within `limit` again, from the disk, two passes each.

        Returns (m,) confirmed, and what is said of those that are. One inside the audited ball must stay there as an
        8-bit file to survive as one.
        """
        said: dict[str, Any] = {"label": [], "confidence": [], "distance": [], "eight_bit": []}
        if not len(ids):
            return torch.ones(0, dtype=torch.bool), said
        threat = self.setting.threat
        low, high = threat.bounds
        inside = threat.contains(exact, x)
        rounded = torch.where(per_row(inside, x), threat.quantise(exact, x), limit.quantise(exact, x))
        levels = ((rounded - low) * (255.0 / (high - low))).round().to(torch.uint8)
        stored = self.evidence.store_images(name, {"ids": ids, "exact": exact, "eight_bit": levels})
        model, decoded = fresh(self.setting.model), self.to(stored["eight_bit"].float() / 255.0 * (high - low) + low)
        again = self.judge(x, y, self.to(stored["exact"]), model, limit)
        saved = self.judge(x, y, decoded, model, limit)
        survives = saved.hit & (~inside | threat.contains(decoded, x))
        confirmed = (again.hit & survives if self.setting.eight_bit else again.hit).cpu()
        if not confirmed.all():
            kept = {key: value[confirmed] for key, value in stored.items()}
            self.evidence.store_images(name, kept)
        distance = threat.distance(self.to(stored["exact"]), x)
        at = confirmed.nonzero().squeeze(1).tolist()
        said["label"] = [int(again.label[row]) for row in at]
        said["confidence"] = [as_json(again.score[row]) for row in at]
        said["distance"] = [as_json(distance[row]) for row in at]
        said["eight_bit"] = [bool(survives[row]) for row in at]
        return confirmed, said

    def judge(self, x: Tensor, y: Tensor, points: Tensor, model: Model, limit: Threat) -> Judged:
        """What `model` and the judge say of `points` within `limit` of images `x` with labels `y`."""
        aim, setting = torch.full_like(y, -1), self.setting
        width = setting.known.fitting(len(y), setting.width, Access.SCORE)
        return replay(model, JUDGE, Batch(x, y, aim, aim, limit), points, width)

    def commit(self, shard: Shard, name: str = "") -> None:
        name = name or self.evidence.fresh(shard.stage)
        if shard.complete:
            seconds = time.monotonic() - self.began
            shard = replace(shard, seconds=seconds)
            self.rate = len(shard.ids) / max(seconds, 1e-9)
        self.evidence.commit(name, shard)
        self.standing.apply(name, shard)

    @property
    def device(self) -> str:
        """Where the model computes."""
        return self.setting.device

    def to(self, tensor: Tensor) -> Tensor:
        """`tensor` where the model computes."""
        return tensor.to(self.device)


def _chosen(said: dict[str, Any], places: list[int]) -> dict[str, Any]:
    return {key: [values[place] for place in places] for key, values in said.items()}
