"""Common corruptions, from the mildest to the most severe: what an attack must beat; labels only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparring.core import noise
from sparring.core.attack import Observation, State
from sparring.core.batch import Batch
from sparring.core.errors import UsageError, unknown
from sparring.core.model import Access


@dataclass(frozen=True)
class CorruptionState(State):
    """How far down the list a row has come."""

    k: Tensor  # (n,) queries answered


@dataclass(frozen=True)
class Corruption:
    """Every kind of corruption at severity 1, then every kind at 2, and so on to `severity`, once each.

    Hendrycks and Dietterich 2019, section 3 and appendix B: nine of their nineteen kinds, those that need neither
    pictures nor an image codec. The constants are those of CIFAR-10-C (the authors' `make_cifar_c.py`), made for
    32 x 32 pixels. `kinds` is all, or one of KINDS. It learns nothing from the answers.
    """

    kinds: str = "all"
    severity: int = 5

    name: ClassVar[str] = "corruption"
    version: ClassVar[int] = 1
    needs: ClassVar[Access] = Access.DECISION
    norms: ClassVar[tuple[str, ...]] = ("unbounded",)
    paper: ClassVar[str] = "a control; Hendrycks and Dietterich 2019, arXiv:1903.12261"
    minimizes: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False
    restricted: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse a kind or a severity that is none."""
        if self.kinds != "all" and self.kinds not in KINDS:
            raise unknown("corruption", self.kinds, [*KINDS, "all"])
        if self.severity not in range(1, 6):
            raise UsageError(f"expected a severity from 1 to 5, got {self.severity}")

    @property
    def _list(self) -> list[tuple[str, int]]:
        """All that is asked about, in order."""
        kinds = list(KINDS) if self.kinds == "all" else [self.kinds]
        return [(kind, severity) for severity in range(1, self.severity + 1) for kind in kinds]

    def init(self, batch: Batch) -> CorruptionState:
        """Ask about the first corruption."""
        return self._at(batch, torch.zeros_like(batch.y))

    def step(self, batch: Batch, state: CorruptionState, seen: Observation) -> CorruptionState:
        """Ask about the next."""
        after = self._at(batch, state.k + 1)
        return replace(state, x=after.x, k=after.k, done=after.done)

    def _at(self, batch: Batch, k: Tensor) -> CorruptionState:
        entries = self._list
        x = batch.x
        for entry in sorted(set(k.tolist())):
            kind, severity = entries[min(entry, len(entries) - 1)]
            rows = (k == entry).nonzero().squeeze(1)
            low, high = batch.threat.bounds
            share = (batch.x[rows].double() - low) / (high - low)
            made = corrupt(share, kind, severity, noise.bits(batch.key[rows], (), entry))
            x = x.index_copy(0, rows, (low + (high - low) * made).to(x.dtype))
        return CorruptionState(batch.project(x), k + 1 >= len(entries), k)


def corrupt(x: Tensor, kind: str, severity: int, key: Tensor) -> Tensor:
    """(n, c, h, w) float64 images in [0, 1] after the corruption `kind` of `severity` 1 to 5; `key` (n,) seeds it."""
    change, constants = KINDS[kind]
    return change(x, constants[severity - 1], key).clamp(0.0, 1.0)


def gaussian_noise(x: Tensor, scale: float, key: Tensor) -> Tensor:
    """Normal noise with deviation `scale`."""
    return x + scale * noise.normal(key, x.shape[1:]).double()


def shot_noise(x: Tensor, photons: float, key: Tensor) -> Tensor:
    """What arrives where `x * photons` are expected (Poisson), over `photons`: by inversion of the distribution."""
    rate, u = x * photons, noise.uniform(key, x.shape[1:]).double()
    low = torch.zeros_like(rate)  # the smallest count whose distribution function exceeds u, by bisection
    high = torch.full_like(rate, photons + 10 * photons**0.5 + 10).ceil()
    while bool((low < high).any()):
        middle = ((low + high) / 2).floor()
        beyond = torch.special.gammaincc(middle + 1, rate) > u
        low, high = torch.where(beyond, low, middle + 1), torch.where(beyond, middle, high)
        low = low.minimum(high)
    return low / photons


def impulse_noise(x: Tensor, share: float, key: Tensor) -> Tensor:
    """A `share` of the features set to black or white, either as likely."""
    u = noise.uniform(key, x.shape[1:])
    return torch.where(u < share / 2, 0.0, torch.where(u < share, 1.0, x))


def speckle_noise(x: Tensor, scale: float, key: Tensor) -> Tensor:
    """Normal noise in proportion to the pixel."""
    return x + x * scale * noise.normal(key, x.shape[1:]).double()


def gaussian_blur(x: Tensor, sigma: float, key: Tensor) -> Tensor:
    """A Gaussian of deviation `sigma`, cut at 4 sigma; beyond the frame its outermost pixels go on."""
    reach = int(4 * sigma + 0.5)
    return _blur(x, _bell(reach, sigma), _onward)


def defocus_blur(x: Tensor, lens: tuple[float, float], key: Tensor) -> Tensor:
    """A disk of radius `lens[0]`, its edge softened by 3 x 3 pixels of a Gaussian of deviation `lens[1]`.

    Beyond the frame the image goes on mirrored at its outermost pixels.
    """
    at = torch.arange(-3, 4, dtype=torch.float64)
    disk = (at[:, None].square() + at.square() <= lens[0] ** 2).double()
    soft = _blur((disk / disk.sum())[None, None], _bell(1, lens[1]), _mirrored)[0, 0]
    return _filter(x, soft, _mirrored)


def brightness(x: Tensor, more: float, key: Tensor) -> Tensor:
    """The value of HSV raised: all channels in proportion, until the largest is `more` larger, or white."""
    value = x.amax(1, keepdim=True)
    brighter = (value + more).clamp_max(1.0)
    return torch.where(value > 0, x * (brighter / value.clamp_min(1e-300)), brighter)


def contrast(x: Tensor, share: float, key: Tensor) -> Tensor:
    """The distance to the mean of its channel, of which `share` is left."""
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * share + mean


def pixelate(x: Tensor, share: float, key: Tensor) -> Tensor:
    """Boxes averaged to an image with `share` of the pixels a side, and that enlarged again."""
    down, right = (_boxes(size, max(1, int(size * share)), x.device) for size in x.shape[2:])
    up, left = (_boxes(max(1, int(size * share)), size, x.device) for size in x.shape[2:])
    return (up @ down) @ x @ (left @ right).T


def _boxes(size: int, to: int, device: torch.device) -> Tensor:
    """(to, size) float64: how a line is resized, each new pixel the mean of the old ones centred in its box."""
    scale = size / to
    old = torch.arange(size, dtype=torch.float64, device=device) + 0.5
    new = (torch.arange(to, dtype=torch.float64, device=device)[:, None] + 0.5) * scale
    offset = (old - new) / max(scale, 1.0)
    inside = ((offset > -0.5) & (offset <= 0.5)).double()
    return inside / inside.sum(1, keepdim=True)


def _bell(reach: int, sigma: float) -> Tensor:
    """(2 reach + 1,) a Gaussian of sum 1."""
    weight = (-(torch.arange(-reach, reach + 1, dtype=torch.float64) / sigma).square() / 2).exp()
    return weight / weight.sum()


def _onward(index: Tensor, size: int) -> Tensor:
    return index.clamp(0, size - 1)


def _mirrored(index: Tensor, size: int) -> Tensor:
    period = max(2 * (size - 1), 1)
    folded = index % period
    return torch.minimum(folded, period - folded) if size > 1 else index * 0


def _blur(x: Tensor, line: Tensor, beyond: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Both ways with the same line."""
    return _filter(x, line[:, None] * line, beyond)


def _filter(x: Tensor, kernel: Tensor, beyond: Callable[[Tensor, int], Tensor]) -> Tensor:
    """`x` (n, c, h, w) with a square kernel, where `beyond` says which pixel stands for one outside the frame."""
    reach = len(kernel) // 2
    rows, columns = (beyond(torch.arange(-reach, size + reach, device=x.device), size) for size in x.shape[2:])
    padded = x[:, :, rows][:, :, :, columns]
    total = torch.zeros_like(x)
    for i in range(len(kernel)):
        for j in range(len(kernel)):
            total = total + kernel[i, j] * padded[:, :, i : i + x.shape[2], j : j + x.shape[3]]
    return total


KINDS: dict[str, tuple[Callable[[Tensor, Any, Tensor], Tensor], tuple[Any, ...]]] = {
    "gaussian_noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "speckle_noise": (speckle_noise, (0.06, 0.1, 0.12, 0.16, 0.2)),
    "gaussian_blur": (gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "defocus_blur": (defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))),
    "brightness": (brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "pixelate": (pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
}
