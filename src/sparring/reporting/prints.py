"""Pictures as files at a size that one could print."""

from __future__ import annotations

import io

import torch
from PIL import Image
from torch import Tensor

_DOTS = 300  # an inch
EDGE = 6  # dots of the line around it, without which white on paper has no end


def poster(image: Tensor, least: int = 1200) -> bytes:
    """A (1, 3 or 4, h, w) uint8 image as a PNG of at least `least` dots a side, every pixel a square of its own.

    A fourth channel says what is see-through; a grey line runs around all that is not.
    """
    colour = image[:3].expand(3, -1, -1)
    opaque = image[3:] if len(image) == 4 else torch.full_like(image[:1], 255)
    factor = max(1, -(-least // min(image.shape[1:])))
    large = torch.cat([colour, opaque]).repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    large = torch.nn.functional.pad(large, (EDGE,) * 4)
    reach = torch.nn.functional.max_pool2d(large[3:].float(), 2 * EDGE + 1, 1, EDGE)
    line = torch.tensor([128, 128, 128, 255], dtype=torch.uint8).view(4, 1, 1)
    drawn = torch.where((reach > 0) & (large[3:] == 0), line, large)
    buffer = io.BytesIO()
    Image.fromarray(drawn.permute(1, 2, 0).contiguous().numpy()).save(
        buffer, "PNG", optimize=True, dpi=(_DOTS, _DOTS)
    )
    return buffer.getvalue()
