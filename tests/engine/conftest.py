"""Models that count what they are asked, or misbehave on purpose."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparring.core.model import Access, Prediction
from sparring.models.torch import TorchModel

Rows = tuple[Tensor, Tensor]


class Counting:
    """Passes every query on, and counts rows asked about and rows differentiated."""

    def __init__(self, model: TorchModel, widest: int | None = None) -> None:
        self.model, self.access, self.bounds, self.widest = model, model.access, model.bounds, widest
        self.widths: list[int] = []
        self.points: list[Tensor] = []
        self.pulls: list[int] = []

    def query(self, x: Tensor, access: Access) -> Prediction:
        if self.widest is not None and len(x) > self.widest:
            raise torch.OutOfMemoryError(f"{len(x)} rows")
        answer = self.model.query(x, access)
        self.widths.append(len(x))
        self.points.append(x.clone())
        inner = answer.vjp
        if inner is None:
            return answer

        def vjp(cotangent: Tensor, *, keep: bool = False) -> Tensor:
            self.pulls.append(len(cotangent))
            return inner(cotangent, keep=keep)

        return Prediction(answer.labels, answer.logits, vjp)


@pytest.fixture
def model(net: nn.Sequential) -> TorchModel:
    return TorchModel(net)


@pytest.fixture
def counting(model: TorchModel) -> Counting:
    return Counting(model)


@pytest.fixture
def limited(model: TorchModel) -> Callable[[int], Counting]:
    return lambda widest: Counting(model, widest)


@pytest.fixture(scope="session")
def rows(digits: Rows, net: nn.Sequential) -> Rows:
    """20 test digits that the network reads right."""
    x, y = digits[0][1500:], digits[1][1500:]
    right = (net(x).argmax(1) == y).nonzero().squeeze(1)[:20]
    return x[right], y[right]
