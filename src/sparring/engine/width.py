"""How many rows go to the model at once.

A model may give a row other low bits in a batch of another width. So a run keeps one width, padded, and
narrows at its tail only if the model, asked, gives the very same bits at the narrower width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparring.core.errors import ModelError
from sparring.core.model import Access, Model

NARROWEST = 4


def automatic(row: Tensor) -> int:
    """A width for images like `row` (c, h, w): it fills this machine's caches, not its memory."""
    budget = 262_144 if row.device.type == "cpu" else 8_000_000
    fits = max(1, budget // max(1, row.numel()))
    return min(512 if row.device.type == "cpu" else 4096, max(NARROWEST, 1 << (fits.bit_length() - 1)))


def narrower(live: int, width: int) -> int:
    """The least width for `live` rows out of few: multiples of 4, and of an eighth of the power of two above."""
    step = max(NARROWEST, 1 << max(0, (live - 1).bit_length() - 3))
    return min(width, -(-live // step) * step)


@dataclass
class Known:
    """Which narrower widths gave a run's own bits, found out once: that hangs on their shapes, not on the images."""

    same: dict[tuple[int, int, Access], bool] = field(default_factory=dict)  # (run's width, narrower, access)

    def fitting(self, live: int, width: int, access: Access) -> int:
        """The least width for `live` rows that is known to give the bits of `width`."""
        alike = [n for (wide, n, asked), same in self.same.items() if same and (wide, asked) == (width, access)]
        return min([n for n in alike if n >= live], default=width)

    def ask(self, model: Model, x: Tensor, narrow: int, width: int, access: Access) -> bool:
        """Is `narrow` worth having, and does it give the bits of `width`, as the width of `x` is known to?"""
        key = (width, narrow, access)
        if key not in self.same:
            if 8 * narrow > 7 * len(x):  # little to gain
                return False
            alike = min(self.fitting(narrow + 1, width, access), len(x))  # the fewest rows that can tell
            self.same[key] = same_bits(model, x[:alike], narrow, access)
        return self.same[key]


def same_bits(model: Model, x: Tensor, width: int, access: Access) -> bool:
    """Does `model` answer for the first `width` rows of `x` alone just what it answers within `x`?"""
    try:
        wide, narrow = model.query(x, access), model.query(x[:width], access)
    except ModelError:
        return False  # who is to blame is found when they are asked in earnest
    if not torch.equal(wide.labels[:width], narrow.labels):
        return False
    if wide.logits is not None and narrow.logits is not None and not torch.equal(wide.logits[:width], narrow.logits):
        return False
    if access < Access.GRADIENT or wide.vjp is None or narrow.vjp is None or wide.logits is None:
        return True
    cotangent = wide.logits.softmax(1)
    return torch.equal(wide.vjp(cotangent)[:width], narrow.vjp(cotangent[:width]))


def out_of_memory(error: RuntimeError) -> bool:
    """Is this the accelerator or the machine saying that a batch was too large?"""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
