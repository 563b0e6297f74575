"""`choral demo --dp-epsilon` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from choral.privacy.accounting import Release, epsilon

DEMO = [sys.executable, "-m", "choral_deploy.cli", "demo", "--rounds", "4", "--clients", "3", "--json"]


def test_it_keeps_to_its_budget_and_says_what_that_costs(tmp_path: Path) -> None:
    done = subprocess.run([*DEMO, "--out", tmp_path / "out", "--dp-epsilon", "8"], check=True, capture_output=True, text=True)
    *printed, last = done.stdout.splitlines()
    report, told = json.loads(last), " ".join(" ".join(printed).split())
    everybody = Release(report["dp_noise"], expected=3, population=3)
    assert report["rounds"] == len(report["epsilon"]) == 4
    assert report["epsilon"] == pytest.approx([epsilon({everybody: count}, 1e-5) for count in (2, 3, 4, 5)])  # and the statistics
    assert 7.9 < report["epsilon"][-1] <= report["dp_budget"] == 8
    assert "Differential privacy: ε = 8 of 8 spent at δ = 1e-05" in told
    assert "The coordinator is trusted" in told
    assert f"noise of {report['dp_noise'] / 3:.2g} times the longest update, over 3 clients" in told
    assert (tmp_path / "out" / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--dp-epsilon", "0"], "--dp-epsilon 0: give a number above 0"),
        (["--dp-epsilon", "inf"], "--dp-epsilon inf: give a number above 0"),
        (["--dp-epsilon", "1e-9"], "no noise up to 10000 keeps ε at 1e-09"),
        (["--dp-epsilon", "8", "--secure"], "--secure contradicts --dp-epsilon"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_anything_is_made(tmp_path: Path, flags: list[str], told: str) -> None:
    done = subprocess.run([*DEMO, "--out", tmp_path / "out", *flags], check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert told in done.stderr
    assert not (tmp_path / "out").exists()
