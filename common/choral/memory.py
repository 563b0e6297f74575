"""How this process deals with the system for memory."""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of mallopt(3)
_KEPT_BYTES = 32 << 20
_ASKED_FOR_BYTES = 4 << 20
_LARGE_BYTES = 16 << 20
_OTHERS = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_")


def keep_freed() -> None:
    """Let the C library (glibc) keep 32 MiB of what is freed at the end of each of its heaps, for what is needed next.

    Transfers take and free a few MiB at a time. The C library would give each back to the system and ask for it again, and the
    system zeroes every page of it: that costs more than whatever is done with the bytes. If the environment has one of `_OTHERS`,
    it is left alone.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _OTHERS):
        return
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:  # not in every C library
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_TOP_PAD, _ASKED_FOR_BYTES)
        mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)
