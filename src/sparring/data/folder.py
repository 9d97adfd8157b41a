"""A folder of images by class: `train/<class>/` and `test/<class>/`, or `<class>/` alone.

Classes are numbered in the order of their names, as torchvision's `ImageFolder` does. Without a test folder
every fifth image of a class, by name, is held out; a class of two to four images gives its last.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sparring.core.errors import DataError
from sparring.data.images import Dataset, Images, Raw

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".webp", ".tif", ".tiff"})
Listing = dict[str, list[Path]]


def load_folder(root: Path) -> Dataset:
    """The images below `root`; `DataError` when they are missing, unreadable, or of different sizes."""
    if any(_folders(root / split) for split in ("train", "test")):
        return _load_splits(root)
    listing = _listing(root)
    held = {path for paths in listing.values() for path in paths[4::5] or paths[1:][-1:]}
    paths = [path for each in listing.values() for path in each]
    classes = tuple(listing)
    raw = Raw(str(root), _stack(_pictures(paths)), _labels(listing, classes))
    whole = Images.checked(root.name, raw, classes)
    return Dataset.split(whole, torch.tensor([path in held for path in paths]))


def _load_splits(root: Path) -> Dataset:
    train, test = _listing(root / "train"), _listing(root / "test")
    classes = tuple(train)
    if strangers := sorted(set(test) - set(train)):
        raise DataError(f"{root / 'test' / strangers[0]}: expected a class of {root / 'train'}, got a new one")
    paths = [path for listing in (train, test) for each in listing.values() for path in each]
    pictures = _stack(_pictures(paths))
    labels = np.concatenate([_labels(train, classes), _labels(test, classes)])
    cut = sum(len(each) for each in train.values())
    return Dataset.checked(
        root.name,
        Raw(str(root / "train"), pictures[:cut], labels[:cut]),
        Raw(str(root / "test"), pictures[cut:], labels[cut:]),
        classes,
    )


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _listing(root: Path) -> Listing:
    listing = {}
    for folder in _folders(root):
        paths = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        listing[folder.name] = sorted(path for path in paths if not path.name.startswith("."))
        if not listing[folder.name]:
            raise DataError(f"{folder}: expected images of class {folder.name!r}, got none; add some or remove it")
    if not listing:
        raise DataError(f"{root}: expected a folder of images for each class, got none; lay it out as <class>/*.png")
    return listing


def _labels(listing: Listing, classes: tuple[str, ...]) -> NDArray[np.int64]:
    return np.array([classes.index(name) for name, paths in listing.items() for _ in paths], np.int64)


def _pictures(paths: list[Path]) -> list[NDArray[np.uint8]]:
    pictures: list[NDArray[np.uint8]] = []
    for path in paths:
        pictures.append(_picture(path))
        if pictures[-1].shape[:2] != pictures[0].shape[:2]:
            (h0, w0), (h, w) = pictures[0].shape[:2], pictures[-1].shape[:2]
            raise DataError(f"expected one size, got {w0} x {h0} in {paths[0]} and {w} x {h} in {path}; resize them")
    return pictures


def _picture(path: Path) -> NDArray[np.uint8]:
    """One image: (h, w, 1) if grey, else (h, w, 3)."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{path}: expected 8 bits a channel, got mode {image.mode}; convert it")
            pixels = np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: expected an image, got {error}; repair or remove it") from error
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _stack(pictures: list[NDArray[np.uint8]]) -> NDArray[Any]:
    """(n, c, h, w): one channel if every image is grey, else three."""
    channels = max(picture.shape[2] for picture in pictures)
    same = [np.broadcast_to(picture, (*picture.shape[:2], channels)) for picture in pictures]
    return np.stack(same).transpose(0, 3, 1, 2)
