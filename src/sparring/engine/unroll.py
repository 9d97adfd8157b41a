"""An attack run to its end with no judge: what adversarial training trains on."""

from __future__ import annotations

from torch import Tensor

from sparring.core.attack import Attack, Observation
from sparring.core.batch import Batch
from sparring.core.judge import Judge
from sparring.core.model import Model


def unroll(model: Model, attack: Attack, batch: Batch) -> Tensor:
    """(n, c, h, w) the last point of every row; rows that are fooled on the way go on like the others."""
    judge = Judge()
    state = attack.init(batch)
    while not state.done.all():
        answer = model.query(state.x, attack.needs)
        seen = Observation(batch, answer, judge.fooled(batch, answer), attack.needs)
        state = attack.step(batch, state, seen)
    points: Tensor = state.x
    return points
