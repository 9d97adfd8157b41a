"""Our own networks, for images of any size: dense, convolutional, wider, and behind a stretched contrast."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sparring.core.errors import unknown


def dense(shape: Sequence[int], classes: int) -> nn.Sequential:
    """The classic fully connected net: two hidden layers of 300 and 100 units (LeCun et al. 1998, C.3)."""
    channels, height, width = shape
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * height * width, 300),
        nn.ReLU(),
        nn.Linear(300, 100),
        nn.ReLU(),
        nn.Linear(100, classes),
    )


def conv(shape: Sequence[int], classes: int) -> nn.Sequential:
    """Two strided 4x4 convolutions of 16 and 32, then 100 units (Wong and Kolter 2018): 166,406 weights on MNIST."""
    return _strided(shape, classes, (16, 32, 100))


def wide_conv(shape: Sequence[int], classes: int) -> nn.Sequential:
    """`conv` twice as wide, with 128 units, for adversarial training, which takes room: 436,202 weights on MNIST."""
    return _strided(shape, classes, (32, 64, 128))


def _strided(shape: Sequence[int], classes: int, widths: tuple[int, int, int]) -> nn.Sequential:
    channels, height, width = shape
    first, second, units = widths
    return nn.Sequential(
        nn.Conv2d(channels, first, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(first, second, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(second * (height // 2 // 2) * (width // 2 // 2), units),
        nn.ReLU(),
        nn.Linear(units, classes),
    )


class Contrast(nn.Module):
    """(p - low) / (high - low), clipped to [0, 1], of every pixel p in [0, 1]; nothing here is learned.

    A share `leak` of the pixel itself is mixed in, and leaves a gradient where the clip has none.
    """

    def __init__(self, low: float = 0.3, high: float = 0.7, leak: float = 0.0) -> None:
        super().__init__()
        self.low, self.high, self.leak = low, high, leak

    def forward(self, x: Tensor) -> Tensor:
        """Images of the same shape."""
        clipped = ((x - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
        return clipped if self.leak == 0 else (1 - self.leak) * clipped + self.leak * x


def contrast_conv(shape: Sequence[int], classes: int) -> nn.Sequential:
    """`conv` behind `Contrast`: a change by up to 0.3 is taken off every black or white pixel before the first layer.

    Certified training on MNIST at 0.3 gains from it, since intervals start from the grey pixels alone.
    """
    return nn.Sequential(Contrast(), *conv(shape, classes))


def wide_contrast_conv(shape: Sequence[int], classes: int) -> nn.Sequential:
    """`wide_conv` behind `Contrast` with a leak of 0.05, for adversarial training on MNIST at 0.3."""
    return nn.Sequential(Contrast(leak=0.05), *wide_conv(shape, classes))


NETS: dict[str, Callable[[Sequence[int], int], nn.Sequential]] = {
    "dense": dense,
    "conv": conv,
    "wide_conv": wide_conv,
    "contrast_conv": contrast_conv,
    "wide_contrast_conv": wide_contrast_conv,
}


def build(name: str, shape: Sequence[int], classes: int, seed: int = 0) -> nn.Sequential:
    """The net called `name` for images of `shape` (c, h, w), its weights drawn from `seed` alone."""
    if name not in NETS:
        raise unknown("net", name, NETS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETS[name](shape, classes)
