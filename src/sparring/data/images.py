"""Labelled images, and the one place where they are checked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparring.core.errors import DataError, UsageError

MAX_CLASSES = 100_000


class Raw(NamedTuple):
    """Images as read and not yet checked; `source` is what an error names."""

    source: str
    x: NDArray[Any]
    y: NDArray[Any]


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images: `x` (n, c, h, w) float32 in [0, 1]; `y` and `ids` (n,) int64.

    `ids` are row numbers in the split the images were read from, and survive subsets and shuffles.
    """

    name: str
    x: Tensor
    y: Tensor
    ids: Tensor
    classes: tuple[str, ...]

    @classmethod
    def checked(cls, name: str, raw: Raw, classes: tuple[str, ...] | None = None) -> Images:
        """Images from arrays; `DataError` unless they are what `Images` promises."""
        x, y = _pixels(raw), _labels(raw)
        if len(x) != len(y):
            raise DataError(f"{raw.source}: expected one label for each image, got {len(x)} images, {len(y)} labels")
        classes = classes or numbered(raw)
        if int(y.max()) >= len(classes):
            raise DataError(f"{raw.source}: expected labels below {len(classes)}, got {int(y.max())}")
        return cls(name, x, y, torch.arange(len(x)), classes)

    def __len__(self) -> int:
        return len(self.y)

    def take(self, limit: int | None) -> Images:
        """The first `limit` images; all of them when `limit` is None."""
        if limit is None:
            return self
        if limit < 1:
            raise UsageError(f"expected a limit of at least 1 image, got {limit}")
        return self.select(torch.arange(min(limit, len(self))))

    def select(self, index: Tensor) -> Images:
        """The rows at `index`: (k,) row numbers, or an (n,) mask."""
        return replace(self, x=self.x[index], y=self.y[index], ids=self.ids[index])

    def digest(self) -> str:
        """SHA-256 (hex) over the shape and the bytes of `x` and of `y`."""
        sha = hashlib.sha256(repr(tuple(self.x.shape)).encode())
        sha.update(self.x.detach().cpu().contiguous().numpy().data)
        sha.update(self.y.cpu().contiguous().numpy().data)
        return sha.hexdigest()


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training split and a test split of the same shape and classes."""

    name: str
    train: Images
    test: Images

    @classmethod
    def checked(cls, name: str, train: Raw, test: Raw, classes: tuple[str, ...] | None = None) -> Dataset:
        """A data set from the arrays of its two splits; `DataError` unless they go together."""
        classes = classes or max(numbered(train), numbered(test), key=len)
        splits = [Images.checked(f"{name}/{s}", raw, classes) for s, raw in (("train", train), ("test", test))]
        shapes = [tuple(split.x.shape[1:]) for split in splits]
        if shapes[0] != shapes[1]:
            raise DataError(f"expected one shape, got {shapes[0]} in {train.source} and {shapes[1]} in {test.source}")
        return cls(name, splits[0], splits[1])

    @classmethod
    def split(cls, whole: Images, held_out: Tensor) -> Dataset:
        """`whole` cut in two by the (n,) mask of its test rows; an empty part means both are the whole."""
        if held_out.all() or not held_out.any():
            held_out, kept = torch.ones_like(held_out), torch.ones_like(held_out)
        else:
            kept = ~held_out
        train, test = (replace(whole.select(part), ids=torch.arange(int(part.sum()))) for part in (kept, held_out))
        name = whole.name
        return cls(name, replace(train, name=f"{name}/train"), replace(test, name=f"{name}/test"))

    def with_validation(self) -> tuple[Images, Images]:
        """The training split less its last sixth (10,000 of 60,000), and that sixth; a single row is both."""
        rows = torch.arange(len(self.train))
        cut = len(rows) - max(1, len(rows) // 6)
        validation = replace(self.train.select(rows[cut:]), name=f"{self.name}/validation")
        return self.train.select(rows[:cut] if cut else rows), validation


def numbered(raw: Raw) -> tuple[str, ...]:
    """The class names "0", "1", ... up to the highest label; two at least, since a classifier tells apart."""
    highest = int(_labels(raw).max())
    if highest >= MAX_CLASSES:
        raise DataError(f"{raw.source}: expected labels that number the classes from 0, got {highest}")
    return tuple(str(label) for label in range(max(2, highest + 1)))


def _pixels(raw: Raw) -> Tensor:
    source, x = raw.source, raw.x
    if x.ndim == 3:
        x = x[:, None]
    if x.ndim != 4 or 0 in x.shape:
        raise DataError(f"{source}: expected one or more images, shape (n, c, h, w) or (n, h, w), got {raw.x.shape}")
    if x.shape[1] > 4 and x.shape[3] in (1, 3):
        raise DataError(f"{source}: expected channels first, got shape {x.shape}; transpose to (n, c, h, w)")
    if x.dtype == np.uint8:
        return torch.from_numpy(x.astype(np.float32)).div_(255)
    if x.dtype.kind != "f":
        raise DataError(f"{source}: expected images of floats in [0, 1] or of uint8, got {x.dtype}")
    with np.errstate(over="ignore"):
        pixels = torch.from_numpy(x.astype(np.float32))
    if not pixels.isfinite().all():
        raise DataError(f"{source}: expected finite images, got NaN or infinity; find and repair these rows")
    if pixels.max() > 1:
        raise DataError(f"{source}: expected images in [0, 1], got a maximum of {pixels.max()}; divide by 255")
    if pixels.min() < 0:
        raise DataError(
            f"{source}: expected images in [0, 1], got a minimum of {pixels.min()}; undo the normalisation"
        )
    return pixels


def _labels(raw: Raw) -> Tensor:
    source, y = raw.source, raw.y
    if y.ndim != 1 or not len(y):
        raise DataError(f"{source}: expected one or more labels, shape (n,), got {y.shape}")
    if y.dtype.kind not in "iu":
        raise DataError(f"{source}: expected integer labels, got {y.dtype}")
    labels = torch.from_numpy(y.astype(np.int64))
    if labels.min() < 0:
        raise DataError(f"{source}: expected labels from 0, got {int(labels.min())}")
    return labels


def to_bytes(x: Tensor) -> Tensor:
    """Images in [0, 1] as uint8."""
    return (x * 255).round().clamp(0, 255).to(torch.uint8)
