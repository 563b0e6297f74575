"""The benchmark of start-up runs, and what it tells is all there and can be true. How long anything takes does not matter here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

STARTUP = Path(__file__).resolve().parents[2] / "benchmarks" / "startup.py"


def test_startup() -> None:
    command = [sys.executable, STARTUP, "--times", "1", "--clients", "1", "--test-set", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["clients"], found["times"], found["test_set"]) == (1, 1, True)
    assert min(found["help_s"], found["torch_s"]) > 0
    assert found["first_round_s"] > found["coordinator_ready_s"] > found["torch_s"] / 10  # another process does import it
    assert found["first_round_s"] > found["client_attends_s"] > 0
    assert found["coordinator_peak_mb"] >= found["coordinator_ready_mb"] > 10
    assert min(found["client_mb"], found["task_process_mb"]) > found["coordinator_ready_mb"]  # they have torch
