"""`choral demo --secure` as a user runs it, beside the same demo in the clear."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

DEMO = [sys.executable, "-m", "choral_deploy.cli", "demo", "--rounds", "6", "--json"]


def demo(out: Path, *flags: str) -> tuple[dict[str, object], str]:
    """The report, and all that was printed before it."""
    done = subprocess.run([*DEMO, "--out", out, *flags], check=True, capture_output=True, text=True)
    *printed, report = done.stdout.splitlines()
    return json.loads(report), "\n".join(printed)


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object], str]:
    """A secure demo of three."""
    out = tmp_path_factory.mktemp("secure") / "out"
    return out, *demo(out, "--clients", "3", "--secure")


def test_it_comes_to_the_model_of_a_plain_demo(secure: tuple[Path, dict[str, object], str], tmp_path: Path) -> None:
    out, report, printed = secure
    plain, _ = demo(tmp_path / "plain", "--clients", "3")
    assert (report["secure"], plain["secure"]) == (True, False)
    ours, theirs = load_file(out / "model.safetensors"), load_file(tmp_path / "plain" / "model.safetensors")
    for name, weights in theirs.items():
        np.testing.assert_allclose(ours[name], weights, rtol=2e-4, atol=2e-4, err_msg=name)
    assert report["test_mse"] == pytest.approx(plain["test_mse"], rel=1e-3)
    assert "the coordinator has seen sums over the clients" in " ".join(printed.split())


def test_its_devices_take_part_in_nothing_else(secure: tuple[Path, dict[str, object], str]) -> None:
    out, _, _ = secure
    for name in ("alice", "bob", "carol"):
        assert "secure_aggregation: true" in (out / name / "state" / "guard.yaml").read_text()
        assert "secure sum done" in (out / "logs" / f"{name}.log").read_text()


def test_two_clients_are_told_what_they_do_not_hide(tmp_path: Path) -> None:
    report, printed = demo(tmp_path / "out", "--secure")
    assert report["clients"] == ["alice", "bob"]
    assert "has the other's: use 3 or more" in " ".join(printed.split())


def test_one_client_alone_is_refused(tmp_path: Path) -> None:
    done = subprocess.run([*DEMO, "--out", tmp_path / "out", "--clients", "1", "--secure"], capture_output=True, text=True)
    assert (done.returncode, "give 3 or more" in done.stderr, "Traceback" in done.stderr) == (2, True, False)
