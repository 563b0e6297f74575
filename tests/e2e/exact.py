"""A run that has all that a restart could lose: statistics, server momentum, a test set, held-out examples, a best version."""

from __future__ import annotations

import hashlib
import json
import random
import socket
from contextlib import suppress
from typing import Any

from e2e.federation import Federation, Process

EXACT_TASK = """
from dataclasses import replace
from choral import Standardize
from torch import nn
import small

task = replace(small.task, name="exact", model=lambda: nn.Sequential(Standardize(2), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))
"""
ROWS = {
    "alice": [(1, 2, 3), (2, 1, 3.5), (0, 1, 1), (1, 0, 1.5), (3, 1, 4), (2, 2, 4.5)],
    "bob": [(5, 2, 8), (4, 1, 5), (0, 5, 4), (2, 7, 9)],
    "test": [(1, 1, 2), (3, 3, 6.5), (2, 0, 2)],
}
CLIENTS = ("alice", "bob")


def free_port() -> int:
    """A port that nobody has at present.

    Not one of those from which connections are made: whoever tries to reach such a port while nobody listens may reach itself.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def configure(federation: Federation, rounds: int, **changes: Any) -> None:
    """Write the task, the shards and the configuration."""
    federation.write_task(EXACT_TASK, "exact")
    for name, rows in ROWS.items():
        federation.write_shard(name, rows)
    federation.address = f"127.0.0.1:{free_port()}"
    run = {
        "rounds": rounds,
        "cohort_size": 2,
        "retry_s": 0,
        "strategy": {"name": "fedavgm", "momentum": 0.5},
        "objective": {"metric": "mae"},
    }
    content = {
        "listen": federation.address,
        "task": "exact:task",
        "run": run | changes.pop("run", {}),
        "evaluation": {"test_set": "test/shard.csv"},
        "spool_bytes": 0,
        "heartbeat_s": 2.0,
        "drain_s": 5.0,
    }
    federation.configure(**content | changes)


def start_client(federation: Federation, name: str, address: str | None = None) -> Process:
    """One of the clients."""
    flags = {"--holdout": 0.4, "--longest-pause-s": 0.5, "--server": address or federation.address}
    return federation.client(name, federation.folder / name / "shard.csv", "exact:task", flags=flags)


def outcome(federation: Federation) -> dict[str, Any]:
    """All that must come out the same: every version's bits, the names, and the server optimizer's state."""
    files = {path.name: path for path in federation.versions.iterdir()}
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items() if not path.is_symlink()}
    return {"files": digests, "names": {name: path.readlink().name for name, path in files.items() if path.is_symlink()}}


def measured(federation: Federation) -> list[dict[str, Any]]:
    """What the last coordinator's log says of each version that it measured."""
    return [json.loads(line) for process in federation.processes for line in process.err if '"measured"' in line]
