"""What processes take: memory, CPU time and bytes on the wire, as the kernel counts them (Linux)."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_COUNTED = re.compile(r"pid=(?P<pid>\d+).*?bytes_acked:(?P<sent>\d+).*?bytes_received:(?P<received>\d+)")


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one process: the most memory that was ever resident, what is resident now, and the CPU time so far."""

    peak_bytes: int
    resident_bytes: int
    cpu_s: float


def usage(pid: int | str = "self") -> Usage:
    """What a process has taken so far. Raises OSError: it has ended."""
    status = Path(f"/proc/{pid}/status").read_text()
    # Of the fields after the command's name, which may hold anything, the 12th and 13th are the time in user and kernel mode.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return Usage(_bytes(status, "VmHWM"), _bytes(status, "VmRSS"), (int(fields[11]) + int(fields[12])) / _TICKS_PER_S)


def cpu_s(pids: Iterable[int]) -> float:
    """The CPU time of some processes."""
    return sum(usage(pid).cpu_s for pid in pids)


def traffic(port: int) -> dict[int, tuple[int, int]] | None:
    """Bytes that each process, by its id, has sent to a port and received from it over the connections that are open now.

    They are TCP's payload: with TLS, HTTP/2 and everything above them, without IP's and TCP's own headers. None: there is no `ss`.
    """
    asked = ["ss", "--tcp", "--info", "--processes", "--numeric", "--no-header", "--oneline", "state", "established"]
    try:
        told = subprocess.run([*asked, f"( dport = :{port} )"], check=True, capture_output=True, text=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    found: dict[int, tuple[int, int]] = {}
    for line in told.splitlines():
        if counted := _COUNTED.search(line):
            pid, sent, received = map(int, counted.group("pid", "sent", "received"))
            before = found.get(pid, (0, 0))
            found[pid] = (before[0] + sent, before[1] + received)
    return found


def _bytes(status: str, field: str) -> int:
    return int(status.partition(f"{field}:")[2].split()[0]) << 10
