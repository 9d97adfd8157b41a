"""What all tests share: one thread, and a small trained network."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from sparring.core.threat import L2

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 8x8 digits: images (1797, 1, 8, 8) in [0, 1] and labels."""
    bunch = load_digits()
    x = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    return x, torch.tensor(bunch.target, dtype=torch.int64)


@pytest.fixture
def scaled_then_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The L2 projection that others use, so that the rest of an attack can be compared with theirs."""

    def project(self: L2, x: Tensor, x0: Tensor) -> Tensor:
        delta = x - x0
        length = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1).clamp_min(1e-12)
        return (x0 + delta * (self.eps / length).clamp_max(1.0)).clamp(*self.bounds)

    monkeypatch.setattr(L2, "project", project)


@pytest.fixture(scope="session")
def net(digits: tuple[Tensor, Tensor]) -> nn.Sequential:
    """A dense network that reads the digits, trained for 300 steps, in eval mode."""
    x, y = digits
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
        optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
        for _ in range(300):
            at = torch.randint(0, 1500, (128,))
            loss = nn.functional.cross_entropy(net(x[at]), y[at])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    assert (net(x[1500:]).argmax(1) == y[1500:]).float().mean() > 0.85
    return net.eval()
