"""What all tests share: one thread, and a small trained network."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 8x8 digits: images (1797, 1, 8, 8) in [0, 1] and labels."""
    bunch = load_digits()
    x = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    return x, torch.tensor(bunch.target, dtype=torch.int64)


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
