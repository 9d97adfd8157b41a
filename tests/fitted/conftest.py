"""A linear model whose optimum is known, rows that a net reads right, and a model that counts what it is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from sparring.core import noise
from sparring.core.model import Access, Prediction
from sparring.models.torch import TorchModel
from sparring.testing import Probe

LOOKED = 20  # rows that the checks before a run ask about: eight, the same eight, four of them


@dataclass(frozen=True)
class Plane:
    """Two classes, a hyperplane, and rows of class 0 whose logits' margins are known."""

    weight: Tensor  # (c, h, w) float64
    offset: float
    model: Probe
    x: Tensor
    y: Tensor

    def margin(self, x: Tensor) -> Tensor:
        """(n,) float64: z_0 - z_1, negative where class 1 is named."""
        return (x.double() * self.weight).flatten(1).sum(1) + self.offset


@pytest.fixture(scope="session")
def plane() -> Callable[..., Plane]:
    """24 rows in a box of `bounds`, with margins of 0.1 to 1.9 times `reach`."""

    def build(reach: float, bounds: tuple[float, float] = (-20.0, 20.0), shape: tuple[int, ...] = (2, 4, 5)) -> Plane:
        weight = noise.normal(torch.tensor([7]), shape).squeeze(0).double()
        offset = 0.25
        x = noise.uniform(torch.arange(24), shape).double() - 0.5
        wanted = torch.linspace(0.1, 1.9, 24, dtype=torch.float64) * reach
        lacking = wanted - (x * weight).flatten(1).sum(1) - offset
        x = (x + lacking.view(-1, 1, 1, 1) * weight / weight.square().sum()).float()

        def logits(flat: Tensor) -> Tensor:
            half = (flat @ weight.flatten() + offset) / 2
            return torch.stack([half, -half], 1)

        return Plane(weight, offset, Probe(logits, bounds=bounds), x, torch.zeros(24, dtype=torch.int64))

    return build


class Counting:
    """Passes every query on, and counts rows asked about and rows differentiated."""

    def __init__(self, net: nn.Module) -> None:
        self.model = TorchModel(net)
        self.access, self.bounds = self.model.access, self.model.bounds
        self.asked = self.pulled = 0

    def query(self, x: Tensor, access: Access) -> Prediction:
        answer = self.model.query(x, access)
        self.asked += len(x)
        inner = answer.vjp

        def vjp(cotangent: Tensor, *, keep: bool = False) -> Tensor:
            assert inner is not None
            self.pulled += len(cotangent)
            return inner(cotangent, keep=keep)

        return Prediction(answer.labels, answer.logits, vjp if inner else None)


@pytest.fixture
def counting(net: nn.Module) -> Counting:
    return Counting(net)


@pytest.fixture(scope="session")
def rows(digits: tuple[Tensor, Tensor], net: nn.Module) -> tuple[Tensor, Tensor]:
    """40 digits that the net reads right."""
    x, y = digits[0][1500:], digits[1][1500:]
    right = (net(x).argmax(1) == y).nonzero().squeeze(1)[:40]
    return x[right], y[right]


@pytest.fixture(scope="session")
def others(digits: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """100 other digits, right and wrong."""
    return digits[0][1300:1400], digits[1][1300:1400]
