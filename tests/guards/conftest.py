"""What the guards' tests share: images, and a linear net whose gradient is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture(scope="session")
def images() -> Tensor:
    """(6, 3, 9, 11) smooth pixels strictly inside [0, 1]."""
    x = torch.rand(6, 3, 9, 11, generator=torch.Generator().manual_seed(0))
    return (x + x.roll(1, 2) + x.roll(1, 3)) / 3 * 0.98 + 0.01


@pytest.fixture(scope="session")
def linear() -> nn.Sequential:
    """Four classes for `images`; logits W x."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(297, 4, bias=False)).requires_grad_(False)
    net[1].weight.copy_(torch.randn(4, 297, generator=torch.Generator().manual_seed(1)))
    return net.eval()
