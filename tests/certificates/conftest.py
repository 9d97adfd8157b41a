"""Small random networks with every kind of layer that can be bounded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparring.certificates.graph import Graph, trace
from sparring.models.torch import TorchModel

SHAPE = (2, 6, 6)


class Residual(nn.Module):
    """A block with a shortcut, whose two branches are also joined side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x)).relu()
        joined = torch.cat([nn.functional.leaky_relu(h + self.second(h), 0.1), h], 1)
        return self.last(torch.flatten(nn.functional.adaptive_avg_pool2d(joined, 1), 1))


def _conv(between: list[nn.Module], act: type[nn.Module]) -> nn.Sequential:
    features = [nn.Conv2d(2, 3, 3, padding=1), *between, act(), nn.Conv2d(3, 4, 3, stride=2, padding=1), act()]
    flat = nn.Sequential(*features, nn.Flatten()).eval()
    width = flat(torch.rand(1, *SHAPE)).shape[1]
    return nn.Sequential(*flat, nn.Linear(width, 8), act(), nn.Linear(8, 3))


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(72, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)
    ),
    "conv": lambda: _conv([], nn.ReLU),
    "batch norm": lambda: _conv([nn.BatchNorm2d(3)], nn.ReLU),
    "max pool": lambda: _conv([nn.MaxPool2d(2)], nn.ReLU),
    "max pool 3": lambda: _conv([nn.MaxPool2d(3, stride=2, padding=1)], nn.ReLU),
    "average pool": lambda: _conv([nn.AvgPool2d(2, padding=1, count_include_pad=False)], nn.ReLU),
    "clipped": lambda: _conv([], lambda: nn.Hardtanh(0.0, 0.3)),  # type: ignore[arg-type]  # called like a type
    "sigmoid": lambda: _conv([], nn.Sigmoid),
    "tanh": lambda: _conv([], nn.Tanh),
    "residual": Residual,
}


def _make(name: str, seed: int = 0) -> nn.Module:
    """The network called `name` with random weights, large enough to bend, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = MAKERS[name]()
        with torch.no_grad():
            for part in net.modules():
                if isinstance(part, nn.Conv2d | nn.Linear):
                    part.weight.mul_(2.0)
                if isinstance(part, nn.BatchNorm2d):
                    part.running_mean.normal_(0, 0.3)  # type: ignore[union-attr]  # it tracks them
                    part.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
                    part.weight.normal_()
                    part.bias.normal_(0, 0.3)
    return net.eval()


def _images(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(count, 2, 6, 6) images, of which some pixels lie on the border of [0, 1], and labels of three classes."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(count, *SHAPE, generator=generator) * 1.4 - 0.2).clamp(0, 1)
    return x, torch.randint(0, 3, (count,), generator=generator)


def _graph_of(net: nn.Module, dtype: torch.dtype = torch.float64) -> Graph:
    """The graph of `net` with normalisation before it."""
    return trace(TorchModel(net, mean=(0.3, 0.4), std=(0.5, 0.8)), SHAPE).graph(dtype)


@pytest.fixture
def make() -> Callable[..., nn.Module]:
    """`make(name, seed)`: a random network."""
    return _make


@pytest.fixture
def images() -> Callable[..., tuple[Tensor, Tensor]]:
    """`images(count, seed)`: images and labels."""
    return _images


@pytest.fixture
def graph_of() -> Callable[..., Graph]:
    """`graph_of(net, dtype)`: what is bounded."""
    return _graph_of


@pytest.fixture(params=list(MAKERS))
def name(request: pytest.FixtureRequest) -> str:
    """Each of the networks in turn."""
    kind: str = request.param
    return kind
