"""How this process asks the system for memory, where the C library is glibc: elsewhere nothing here does anything.

If the environment has one of glibc's own variables for it, that is left alone.
"""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8  # of mallopt(3)
_KEPT_BYTES = 32 << 20
_ASKED_FOR_BYTES = 4 << 20
_LARGE_BYTES = 16 << 20
_HEAPS = 2
_THEIRS = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_ARENA_MAX")


def keep_freed() -> None:
    """Keep 32 MiB of what is freed at the end of each heap, for what is needed next.

    Transfers take and free a few MiB at a time. The C library would give each back to the system and ask for it again, and the
    system zeroes every page of it: that costs more than whatever is done with the bytes.
    """
    _set({_TRIM_THRESHOLD: _KEPT_BYTES, _TOP_PAD: _ASKED_FOR_BYTES, _MMAP_THRESHOLD: _LARGE_BYTES})


def few_heaps() -> None:
    """Let all threads share two heaps, or each would keep in its own what many transfers have left; to be called before all."""
    _set({_ARENA_MAX: _HEAPS})


def _set(options: dict[int, int]) -> None:
    if sys.platform != "linux" or any(name in os.environ for name in _THEIRS):
        return
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:  # not in every C library
        for option, value in options.items():
            mallopt(option, value)
