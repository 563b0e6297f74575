"""A run that has all that a restart could lose: statistics, server momentum, a test set, held-out examples, a best version."""

from __future__ import annotations

import hashlib
import json
import random
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from e2e.federation import Federation, Process
from e2e.zygote import Zygote

EXACT_TASK = """
from dataclasses import replace
from choral import Standardize
from torch import nn
import small

task = replace(small.task, name="exact", model=lambda: nn.Sequential(Standardize(2), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))
"""
PACED_TASK = f"""
import json, os, sys, time
from pathlib import Path
{EXACT_TASK}
calls = 0


def allowed():
    try:
        return int(Path(os.environ.get("GATE", "gone")).read_text() or 0)
    except FileNotFoundError:
        return calls


def loss(prediction, target):
    global calls
    calls += 1
    if calls > allowed():
        print(json.dumps({{"event": "at the gate"}}), file=sys.stderr, flush=True)
        while calls > allowed():
            time.sleep(0.01)
    return small.task.loss(prediction, target)


task = replace(task, loss=loss)
"""
"""The exact task; the file GATE of a client's environment says after how many batches it waits, until it is gone or says more."""
BATCHES = 3  # that alice has in a round: two to train on, and one that she measures the version on
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
    federation.invite(*CLIENTS)  # the coordinator may die before it could let anybody in


def pace(federation: Federation) -> None:
    """Let clients wait at a gate."""
    federation.write_task(PACED_TASK, "exact")


def start_client(federation: Federation, name: str, address: str | None = None, gate: Path | None = None) -> Process:
    """One of the clients; it passes the `gate`, if it has one and the federation is paced, as often as that file says."""
    flags = {"--holdout": 0.4, "--longest-pause-s": 0.5, "--server": address or federation.address}
    environment = {"GATE": gate} if gate is not None else {}
    return federation.client(name, federation.folder / name / "shard.csv", "exact:task", flags=flags, environment=environment)


def undisturbed(folder: Path, zygote: Zygote, rounds: int) -> dict[str, Any]:
    """What comes out when nothing happens."""
    with Federation(folder, zygote=zygote) as federation:
        configure(federation, rounds)
        everyone = [federation.start_coordinator(), *(start_client(federation, name) for name in CLIENTS)]
        assert [process.code() for process in everyone] == [0, 0, 0]
        return outcome(federation)


def outcome(federation: Federation) -> dict[str, Any]:
    """All that must come out the same: every version's bits, the names, and the server optimizer's state."""
    files = {path.name: path for path in federation.versions.iterdir()}
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items() if not path.is_symlink()}
    return {"files": digests, "names": {name: path.readlink().name for name, path in files.items() if path.is_symlink()}}


def measured(federation: Federation) -> list[dict[str, Any]]:
    """What the last coordinator's log says of each version that it measured."""
    return [json.loads(line) for process in federation.processes for line in process.err if '"measured"' in line]
