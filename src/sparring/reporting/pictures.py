"""Image tensors as pictures inside the page."""

from __future__ import annotations

import base64
import io

import torch
from markupsafe import Markup
from PIL import Image
from torch import Tensor

_BLUE, _WHITE, _RED = (33.0, 102.0, 172.0), (247.0, 247.0, 247.0), (178.0, 24.0, 43.0)


def data_uri(image: Tensor) -> str:
    """A (1 or 3, h, w) uint8 image as a PNG data URI."""
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def picture(image: Tensor, alt: str) -> Markup:
    """An `<img>` of a (1 or 3, h, w) uint8 image."""
    height, width = image.shape[1:]
    markup = Markup('<img src="{}" alt="{}" width="{}" height="{}">')
    return markup.format(data_uri(image), alt, width, height)


def drawable(images: Tensor) -> Tensor:
    """Images (m, c, h, w) with 1 or 3 channels; of any other number of them, the mean."""
    return images if images.shape[1] in (1, 3) else images.to(torch.float32).mean(1, keepdim=True)


def as_bytes(images: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Float images (m, c, h, w) within `bounds` as uint8 ones that can be drawn; uint8 ones as they are."""
    if images.dtype == torch.uint8:
        return images
    low, high = bounds
    share = (drawable(images).to(torch.float32) - low) / (high - low)
    return (255 * share.nan_to_num(0.0).clamp(0, 1)).round().to(torch.uint8)


def signed(change: Tensor) -> Tensor:
    """A (1 or 3, h, w) change in -1..1 as a uint8 image around its middle.

    One channel runs blue, white, red; three channels run each from 0 over mid grey to 255.
    """
    change = change.to(torch.float32).clamp(-1, 1)
    if change.shape[0] == 3:
        return (127.5 + 127.5 * change).round().to(torch.uint8)
    low, middle, high = (torch.tensor(colour).view(3, 1, 1) for colour in (_BLUE, _WHITE, _RED))
    mapped = middle + change.clamp(min=0) * (high - middle) + (-change).clamp(min=0) * (low - middle)
    return mapped.round().to(torch.uint8)
