"""`choral demo` as a user runs it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from choral.tasks.boston_housing import task
from safetensors.torch import load_file
from torch.nn.functional import mse_loss

DEMO = [sys.executable, "-m", "choral_deploy.cli", "demo"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The output folder of a demo of four rounds, and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    done = subprocess.run([*DEMO, "--rounds", "4", "--json", "--out", out], check=True, capture_output=True, text=True)
    return out, done.stdout.splitlines()


def test_the_last_line_is_the_report(demo: tuple[Path, list[str]]) -> None:
    out, printed = demo
    report = json.loads(printed[-1])
    assert report["rounds"] == 4
    assert report["clients"] == ["alice", "bob"]
    assert set(report["alone_mse"]) == {"alice", "bob"}
    assert min(report["pooled_mse"], report["round_s_p50"], *report["alone_mse"].values()) > 0
    assert report["wall_s"] > report["federated_s"] > 4 * report["round_s_p50"]
    assert len(report["history"]) == 4
    assert json.loads((out / "report.json").read_text()) == report
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_the_table_comes_before_it(demo: tuple[Path, list[str]]) -> None:
    text = "\n".join(demo[1][:-1])
    assert "alice alone" in text
    assert "federated" in text


def test_the_checkpoint_predicts_from_raw_features_as_well_as_the_report_says(demo: tuple[Path, list[str]]) -> None:
    out, printed = demo
    report = json.loads(printed[-1])
    model = task.initial_model(0)
    model.load_state_dict(load_file(report["checkpoint"]))
    x, y = task.load(out / "coordinator" / "test.csv")[:]
    with torch.inference_mode():
        assert mse_loss(model(x), y).item() == pytest.approx(report["test_mse"], rel=1e-5)


def test_every_device_ends_with_the_same_model(demo: tuple[Path, list[str]]) -> None:
    out, _ = demo
    models = {
        (out / name).read_bytes() for name in ("model.safetensors", "alice/state/model.safetensors", "bob/state/model.safetensors")
    }
    assert len(models) == 1


def test_a_folder_of_somebody_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    done = subprocess.run([*DEMO, "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 2
    assert "give another folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.fixture
def training(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A demo that trains and would go on for hours, in a session of its own as on a terminal."""
    command = [*DEMO, "--rounds", "100000", "--out", tmp_path / "out"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _wait_for_round_10(process)
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("number", "send"),
    [(signal.SIGINT, os.killpg), (signal.SIGINT, os.kill), (signal.SIGTERM, os.kill)],
    ids=["Ctrl-C, which a terminal sends to all of them", "SIGINT", "SIGTERM"],
)
def test_an_interrupted_demo_leaves_no_process_behind(
    training: subprocess.Popen[str], number: signal.Signals, send: Callable[..., None]
) -> None:
    children = set(_descendants(training.pid))
    assert len(children) == 4  # the coordinator, the process with its task, alice and bob
    send(training.pid, number)
    assert training.wait(60) == 130
    assert training.stderr is not None
    assert "Traceback" not in training.stderr.read()
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_a_killed_demo_takes_its_processes_with_it(training: subprocess.Popen[str]) -> None:
    ends = [os.pidfd_open(child) for child in set(_descendants(training.pid))]
    assert len(ends) == 4
    training.kill()
    for end in ends:  # readable once the process has ended
        assert select.select([end], [], [], 60)[0]
        os.close(end)


def _wait_for_round_10(process: subprocess.Popen[str]) -> None:
    said = []
    assert process.stderr is not None
    for line in process.stderr:
        said.append(line)
        if line.startswith("round 10/"):
            return
    raise AssertionError("".join(said))


def _descendants(pid: int) -> Iterator[int]:
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        yield int(child)
        yield from _descendants(int(child))
