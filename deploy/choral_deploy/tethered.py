"""Runs another module in a process that ends with its parent, even if the parent is killed and can tell nobody any more.

    python -m choral_deploy.tethered PARENT_PID MODULE [ARGUMENT …]

The process asks the kernel for that itself (Linux; elsewhere it just runs the module): code between fork and exec in a parent that
uses gRPC crashes the child.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Tie this process to its parent, then become the module."""
    parent, module = int(sys.argv[1]), sys.argv[2]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it was killed before we could ask
            sys.exit(0)
    sys.argv = sys.argv[2:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
