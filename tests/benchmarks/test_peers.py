"""The benchmark beside other frameworks, as far as it goes without them: what it starts, ends and tells."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

import pytest
from choral.errors import ChoralError
from marked import Deployment, deployed
from peers import PEERS, ROWS, Outcome, outcome, tell, times_in, tried
from usage import usage

SLEEPER = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; print(1, flush=True); time.sleep(600)'])"


async def until_it_says(log: Path, text: str) -> None:
    """Wait for a log."""
    while text not in log.read_text():
        await asyncio.sleep(0.01)


async def test_what_a_deployment_started_ends_with_it_and_so_does_what_that_started(tmp_path: Path) -> None:
    async with deployed(tmp_path, "nobody", {}) as there:
        await there.start("parent", sys.executable, "-c", SLEEPER)
        await until_it_says(tmp_path / "parent.log", "1")
        assert len(there.processes()) == 2
    assert there.processes() == {}


async def test_the_servers_memory_is_that_of_its_processes_and_of_those_they_started(tmp_path: Path) -> None:
    async with deployed(tmp_path, "import subprocess", {}) as there:
        parent = await there.start("parent", sys.executable, "-c", SLEEPER)
        await until_it_says(tmp_path / "parent.log", "1")
        there.sample()
        alone = usage(parent.pid).resident_bytes
        assert alone < there.peak_bytes < 2 * alone  # what both share is counted once
        nobodys = Deployment(tmp_path, "nobody", {}, mark=there.mark)
        nobodys.sample()
        assert nobodys.peak_bytes == 0


async def test_a_peer_that_ends_too_early_is_told_with_its_last_words(tmp_path: Path) -> None:
    async with deployed(tmp_path, "nobody", {}) as there:
        run = await there.start("run", sys.executable, "-c", "import sys; sys.exit('no port is free')")
        with pytest.raises(ChoralError, match="exit code 1 after 0 rounds: no port is free"):
            await times_in(tmp_path / "times", 3, there, "run", run)


def test_the_first_round_counts_for_the_launch_only(tmp_path: Path) -> None:
    there = Deployment(tmp_path, "nobody", {}, peak_bytes=7)
    assert outcome([10.0, 20.0, 21.0, 24.0, 25.0], 4.0, there) == Outcome(cycle_s=1.0, server_peak_bytes=7, launch_s=16.0)


@pytest.mark.parametrize("name", PEERS)
async def test_a_peer_that_cannot_be_installed_is_told_in_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    options = argparse.Namespace(venvs=tmp_path / "file", rounds=1, patience_s=60, torch=False)
    told = await tried(PEERS[name], ROWS["small-2"], options)
    assert list(told) == ["failed"]
    assert "file" in told["failed"]
    assert len(told["failed"].splitlines()) == 1


def test_the_table_has_ratios_and_says_who_failed(capsys: pytest.CaptureFixture[str]) -> None:
    row = {
        "row": "small-2",
        "clients": 2,
        "params": 1700,
        "choral": vars(Outcome(0.02, 250_000_000, 4.0)),
        "plaintext_floor_s": 0.002,
        "mtls_floor_s": 0.003,
        "flower": vars(Outcome(6.5, 600_000_000, 14.0)),
        "nvflare": {"failed": "it was not there"},
    }
    tell([row], ["flower", "nvflare"], torch=False)
    lines = capsys.readouterr().out.splitlines()
    assert "| round: 1700 parameters, 2 clients | 2.0 ms (3.0 ms) | 20.0 ms | 6.50 s | 325.0 x | failed |  |" in lines
    assert "| server peak memory: 1700 parameters, 2 clients |  | 250.0 MB | 600.0 MB | 2.4 x | failed |  |" in lines
    assert "| launch until the first round is done: 1700 parameters, 2 clients |  | 4.00 s | 14.00 s | 3.5 x | failed |  |" in lines
