"""The benchmark runs, and prints what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("as_json", [True, False])
def test_bytes_and_accuracy_of_each_codec_are_printed(as_json: bool) -> None:
    arguments = ["--clients", "2", "--rounds", "2", "--codec", "float32", "--codec", "int8", *(["--json"] if as_json else [])]
    command = [sys.executable, ROOT / "benchmarks" / "compression.py", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    if not as_json:
        assert [line.split()[0] for line in ran.stdout.splitlines()[2:]] == ["float32", "int8"]
        return
    plain, small = json.loads(ran.stdout)
    assert (plain["up_bytes"], small["up_bytes"]) == (4 * 2410, 2410 + 4 * 10)
    assert small["up_to_float32"] <= 0.27
    assert small["down_to_float32"] == 1
    assert small["points_lost"] == pytest.approx(100 * (plain["accuracy"] - small["accuracy"]))
    assert 0 < small["accuracy"] <= 1


def test_speeds_are_printed() -> None:
    command = [sys.executable, ROOT / "benchmarks" / "compression.py", "--speed", "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = {one["codec"]: one for one in json.loads(ran.stdout)}
    assert rows["int8"]["to_float32"] == 0.25390625
    assert all(one["encode_mb_per_s"] > 0 and one["decode_mb_per_s"] > 0 for one in rows.values())
