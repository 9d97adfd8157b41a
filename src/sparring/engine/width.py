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
    """The least width for `live` rows, `NARROWEST` or more: halvings of `width`, and three quarters of one."""
    needed = max(live, NARROWEST)
    while width % 2 == 0 and width // 2 >= needed:
        width //= 2
    return width * 3 // 4 if width % 4 == 0 and width * 3 // 4 >= needed else width


@dataclass
class Known:
    """Which widths gave which others' bits, found out once: that hangs on their shapes, not on what is in them."""

    same: dict[tuple[int, int, Access], bool] = field(default_factory=dict)  # (wide, narrow, access)

    def fitting(self, live: int, width: int, access: Access) -> int:
        """The least width for `live` rows that is known to give the bits of `width`."""
        alike, least = {width}, width
        for (wide, narrow, asked), same in sorted(self.same.items(), reverse=True):  # the widest first
            if same and asked == access and wide in alike and narrow >= live:
                alike.add(narrow)
                least = min(least, narrow)
        return least

    def ask(self, model: Model, x: Tensor, narrow: int, access: Access) -> bool:
        """`same_bits`, asked no more than once."""
        key = (len(x), narrow, access)
        if key not in self.same:
            self.same[key] = same_bits(model, x, narrow, access)
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
