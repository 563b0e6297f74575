"""The benchmark trains with and without noise, and prints what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from choral.privacy.accounting import Accountant, Release, Sampling, epsilon

ROOT = Path(__file__).parents[2]
BENCHMARK = [sys.executable, ROOT / "benchmarks" / "dp_utility.py"]


def test_each_epsilon_is_trained_for_and_kept_to(tmp_path: Path) -> None:
    sizes = ["--clients", "12", "--cohort", "6", "--rounds", "2", "--seeds", "2", "--epsilon", "3"]
    command = [*BENCHMARK, *sizes, "--plot", tmp_path / "plot.png", "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    plain, clipped, private = json.loads(ran.stdout)
    assert [row["name"] for row in (plain, clipped, private)] == ["plain", "no noise", "ε = 3"]
    release = Release(private["noise"], Sampling.POISSON, 6, 12)
    assert private["spent"] == pytest.approx(epsilon({release: 2}, 1e-5, Accountant.PLD))
    assert private["spent"] <= 3
    for row in (plain, clipped, private):
        assert len(row["accuracies"]) == len(row["memberships"]) == 2
        assert 0 <= row["membership"] <= 1
    assert plain["accuracy"] > private["accuracy"]  # the noise of so few drowns all
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_what_cannot_be_run_is_said() -> None:
    ran = subprocess.run([*BENCHMARK, "--clients", "3", "--cohort", "4"], capture_output=True, text=True, check=False)
    assert ran.returncode != 0
    assert "--cohort 4: is more than --clients 3" in ran.stderr
