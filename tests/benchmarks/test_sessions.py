"""The benchmark of many sessions says what it is to say; how long anything takes is not for a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SESSIONS = Path(__file__).parents[2] / "benchmarks" / "sessions.py"


def test_sessions_are_held_and_rounds_run() -> None:
    sizes = ["--sessions", "14", "--cohort", "5", "--params", "7", "--rounds", "2", "--idle-s", "1"]
    ran = subprocess.run([sys.executable, SESSIONS, *sizes, "--json"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert (found["sessions"], found["cohort"], found["params"]) == (14, 5, 7)
    assert found["joins_per_s"] > 0
    assert found["server_memory_mb"] > 0
    assert found["heartbeat_core"] >= 0
    assert 0 < found["announcement_s_p50"] <= found["announcement_s_p99"]
    assert found["round_s_p50"] > 0
    assert found["server_cpu_ms_per_part"] >= 0
    assert found["swarm_cpu_ms_per_part"] > 0


def test_a_cohort_that_cannot_be_is_refused() -> None:
    ran = subprocess.run(
        [sys.executable, SESSIONS, "--sessions", "14", "--cohort", "15"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert "--cohort 15 is more than --sessions 14" in ran.stderr
