"""The benchmarks run, and what they tell is all there and can be true. How fast anything is does not matter here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PARAMS = 100_000


def told(name: str, *arguments: object) -> dict[str, Any]:
    """What a benchmark prints with --json."""
    command = [sys.executable, BENCHMARKS / name, *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_rounds() -> None:
    found = told("rounds.py", "--clients", 2, "--params", PARAMS, "--rounds", 3)
    assert (found["clients"], found["params"], found["rounds"], found["codec"]) == (2, PARAMS, 3, None)
    assert found["database"] == "SQLite, a file"
    assert 0 < found["round_ms_p50"] <= found["round_ms_p95"]
    assert 0 < found["cycle_ms_p50"] <= found["cycle_ms_p95"]
    assert found["round_ms_p50"] > found["bare_call_ms_p50"] > 0
    assert found["server_peak_bytes"] >= found["server_ready_bytes"] > 10_000_000
    assert found["client_peak_bytes"] > found["client_imports_bytes"] > 10_000_000
    beyond = found["client_peak_bytes"] - found["client_imports_bytes"]
    assert found["client_peak_beyond_imports_in_models"] == beyond / (4 * PARAMS)
    assert min(found["server_cpu_s_per_round"], found["client_cpu_s_per_round"]) > 0
    assert found["launch_s"] > found["round_ms_p50"] / 1000
    for kind in ("plaintext", "mtls"):
        assert found[f"{kind}_floor_bytes_per_s"] == 2 * 2 * 4 * PARAMS / found[f"{kind}_floor_s"] > 0
        share = found["payload_bytes_per_s_in_cycle"] / found[f"{kind}_floor_bytes_per_s"]
        assert found[f"payload_to_{kind}_floor_in_cycle"] == share
    for way in ("sent", "received"):  # the model, and a little more
        moved = found[f"client_{way}_bytes_per_round"]
        assert moved is None if shutil.which("ss") is None else 4 * PARAMS < moved < 1.2 * 4 * PARAMS


def test_memory(tmp_path: Path) -> None:
    plot = tmp_path / "memory.png"
    found = told("memory.py", "--clients", 1, 3, "--params", PARAMS, "--rounds", 2, "--plot", plot)
    assert [each["clients"] for each in found["found"]] == [1, 3]
    assert found["found"][0]["to_first"] == 1
    assert all(each["server_peak_bytes"] >= each["server_ready_bytes"] > 10_000_000 for each in found["found"])
    assert plot.read_bytes().startswith(b"\x89PNG\r\n")


def test_a_codec_that_the_coordinator_does_not_know_is_refused_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "rounds.py", "--codec", "no-such-codec", "--rounds", "2"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "compression" in done.stderr


def test_secagg() -> None:
    found = told("secagg.py", "--clients", 7, "--params", PARAMS)["rows"]
    assert [(row["clients"], row["params"], row["gone"]) for row in found] == [(7, PARAMS, 2)]
    assert all(found[0][name] > 0 for name in ("keys_s", "mask_s", "unmask_s", "unmask_gone_s"))
    assert found[0]["upload_to_float32"] == 1
    assert 1 <= found[0]["memory_in_vectors"] < 100  # of so small a vector the buffers are many times as large
