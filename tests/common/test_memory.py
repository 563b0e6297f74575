"""What the C library is told, seen from outside: what a process holds when it has freed what it had."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

ONES = """
import ctypes, resource, sys
from choral import memory
if sys.argv[1] == "keep":
    memory.keep_freed()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
def take():
    for _ in range(50):
        at = libc.malloc(3 << 20)
        ctypes.memset(at, 1, 3 << 20)
        libc.free(at)
take()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
take()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_what_was_freed_is_used_again_without_a_page_fault_unless_the_environment_decides() -> None:
    def faults(how: str, environment: dict[str, str]) -> int:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
        done = subprocess.run(
            [sys.executable, "-c", ONES, how], capture_output=True, text=True, check=True, env=clean | environment
        )
        return int(done.stdout)

    asks = faults("do not", {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)})
    assert asks > 1000  # each page is asked for again
    assert faults("keep", {}) < asks / 10
    assert faults("keep", {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}) > 1000
