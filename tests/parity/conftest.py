"""An attack point by point, to be laid beside a reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sparring.core.attack import Attack, Observation, State
from sparring.core.batch import Batch
from sparring.core.judge import Judge
from sparring.core.losses import Loss
from sparring.core.model import Access, Model
from sparring.testing import Puzzle


def _row(case: Puzzle, row: int) -> Batch:
    one = slice(row, row + 1)
    target = torch.full((1,), -1) if case.targets is None else case.targets[row]
    return Batch(case.x[one], case.y[one], target, torch.tensor([77 + row]), case.limit)


@pytest.fixture(scope="session")
def states() -> Callable[..., Iterator[tuple[State, bool]]]:
    """Every state of one row to its last, and whether the point that it asks about has the wanted class."""

    def walk(attack: Attack, case: Puzzle, row: int) -> Iterator[tuple[State, bool]]:
        batch = _row(case, row)
        state = attack.init(batch)
        while True:
            said = case.model.query(state.x, attack.needs)
            hit = Judge().adversarial(batch, state.x, said)
            yield state, bool(Judge().fooled(batch, said))
            if state.done:
                return
            state = attack.step(batch, state, Observation(batch, said, hit, attack.needs))

    return walk


@pytest.fixture(scope="session")
def scored() -> Callable[..., Iterator[tuple[State, float]]]:
    """So many states of one row, whatever the judge says, and the loss where each asks."""

    def walk(attack: Attack, case: Puzzle, row: int, turns: int, loss: Loss) -> Iterator[tuple[State, float]]:
        batch, never = _row(case, row), torch.zeros(1, dtype=torch.bool)
        state = attack.init(batch)
        for _ in range(turns):
            said = case.model.query(state.x, Access.SCORE)
            yield state, float(loss(said.logits, batch))
            state = attack.step(batch, state, Observation(batch, said, never, Access.SCORE))

    return walk


@pytest.fixture(scope="session")
def points() -> Callable[..., Tensor]:
    """(queries, n, ...) all that an attack with gradients asks about, whether it has won or not."""

    def walk(attack: Any, model: Model, batch: Batch) -> Tensor:
        state, asked = attack.init(batch), []
        while not state.done.any():
            asked.append(state.x)
            seen = Observation(batch, model.query(state.x, Access.GRADIENT), batch.targeted & False, Access.GRADIENT)
            state = attack.step(batch, state, seen)
        assert state.done.all()
        return torch.stack([*asked, state.x])

    return walk
