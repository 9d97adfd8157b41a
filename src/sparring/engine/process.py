"""What a process of ours asks of the machine it runs on. See docs/decisions/003."""

from __future__ import annotations

import ctypes
import sys

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
