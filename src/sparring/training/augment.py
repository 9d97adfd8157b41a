"""Small random shifts of the training images, drawn from counter-based noise."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparring.core import noise


def shift(x: Tensor, key: Tensor, most: int) -> Tensor:
    """Images `x` (n, c, h, w), each moved by up to `most` pixels both ways; what comes in is black."""
    if most == 0:
        return x
    n, channels, height, width = x.shape
    move = (noise.uniform(key, (2,), stream=1) * (2 * most + 1)).long()
    rows = (move[:, :1] + torch.arange(height, device=x.device))[:, None, :, None]
    columns = (move[:, 1:] + torch.arange(width, device=x.device))[:, None, None, :]
    image = torch.arange(n, device=x.device)[:, None, None, None]
    channel = torch.arange(channels, device=x.device)[None, :, None, None]
    return pad(x, (most,) * 4)[image, channel, rows, columns]
