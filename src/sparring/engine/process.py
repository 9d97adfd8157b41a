"""What a process of ours asks of the machine it runs on. See docs/decisions/003."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of the GNU C library
_KEPT = 1 << 30  # bytes


def keep_freed_memory() -> None:
    """Let the GNU C library keep freed memory for the next batch; elsewhere, do nothing.

    A batch's activations are allocated and freed at every model call. Given back to the system each time,
    their pages are zeroed and faulted in again, which took a quarter to a third of the time on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)


_sharing = 0  # how many `shared_cores` are open


@contextmanager
def shared_cores() -> Iterator[None]:
    """While this lasts `yield_cores` has an effect; after it torch has the threads that it had before."""
    global _sharing
    before = torch.get_num_threads()
    _sharing += 1
    try:
        yield
    finally:
        _sharing -= 1
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def yield_cores() -> None:
    """For a model that another framework computes, with threads of its own: torch goes on with one.

    Two pools on the same cores wait for each other: the little that torch does between two calls, on 256 images
    a fraction of a millisecond, took tens of them on a machine that had other work to do.
    """
    if _sharing and torch.get_num_threads() > 1:
        torch.set_num_threads(1)
