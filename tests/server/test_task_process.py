"""A task's code in a process of its own: what it says comes back, and nothing that it does can stop or mislead the coordinator."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from choral.errors import ConfigError, DataError, TaskError, TaskProcessGone
from choral.plan import Training
from choral_server.blueprint import Blueprint
from choral_server.task_code import HostedTask
from choral_server.task_process import TaskProcess
from safetensors.torch import load_file

TASK = """
import os, signal, sys
from pathlib import Path
from choral import Standardize, Table, Task, Training
from torch import nn
from torch.nn.functional import l1_loss, mse_loss

print("what a task prints is no answer")
os.write(1, b'\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x02{}')


def model():
    return nn.Sequential(Standardize(2, keep=[1]), nn.Linear(2, 1), nn.BatchNorm1d(1, affine=False))


def worst(prediction, target):
    print("measuring")
    if Path("crash").exists():
        Path("crash").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    if Path("hang").exists():
        Path("hang").unlink()
        while True:
            pass
    return (prediction - target).abs().max()


task = Task("plane", model, mse_loss, Table(["a", "b"], target="y"), {"worst": worst}, Training(epochs=4), version="7")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the coordinator is started, and the task's module and a test set are."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plane.py").write_text(TASK)
    (tmp_path / "test.csv").write_text("a,b,y\n1,2,3\n2,1,3\n")
    return tmp_path


@asynccontextmanager
async def hosted(reference: str = "plane:task", test_set: Path | None = None) -> AsyncIterator[HostedTask]:
    code = HostedTask(TaskProcess(), reference, 7, test_set)
    try:
        yield code
    finally:
        await code.end()


def pid(code: HostedTask) -> int:
    assert code._process is not None
    return code._process._process.pid


async def gone(process: int) -> None:
    """Wait until there is no such process, as is told by the number's end."""
    descriptor = os.pidfd_open(process)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(descriptor, ended.set)
    await ended.wait()
    asyncio.get_running_loop().remove_reader(descriptor)
    os.close(descriptor)


async def test_what_a_task_is_and_its_initial_weights(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async with hosted() as code:
        await code.open()
        told = code.blueprint
        assert (told.task, told.version, told.metrics, told.training) == ("plane", "7", ("worst",), Training(epochs=4))
        assert [entry.name for entry in told.manifest.averaged] == ["1.weight", "1.bias", "2.running_mean", "2.running_var"]
        assert told.keep == (1,)
        assert [entry.name for entry in told.statistics or ()] == ["0.mean", "0.scale"]
        assert Blueprint.from_json(json.loads(json.dumps(told.to_json()))) == told
        await code.write_initial(folder / "first", {"choral": "x"})
        assert (folder / "first").stat().st_mode == (folder / "test.csv").stat().st_mode  # others may read it
        first = pid(code)
        ending = asyncio.create_task(gone(first))
        code.rest()
        await ending  # without a test set nothing is left
        await code.write_initial(folder / "again", {"choral": "x"})  # for a further run
        assert pid(code) != first
        assert (folder / "again").read_bytes() == (folder / "first").read_bytes()
        assert set(load_file(folder / "first")) == {entry.name for entry in told.manifest.entries}
    assert "what a task prints is no answer" in capfd.readouterr().out


async def test_a_task_that_has_changed_is_not_mixed_with_what_it_was(folder: Path) -> None:
    async with hosted() as code:
        await code.open()
        code.rest()
        (folder / "plane.py").write_text(TASK.replace('version="7"', 'version="8.1"'))
        with pytest.raises(ConfigError, match=r"^task 'plane:task' is not what it was when the coordinator started"):
            await code.write_initial(folder / "first", {})


async def test_a_version_is_measured_again_after_a_crash_and_after_a_hang_that_was_given_up(folder: Path) -> None:
    async with hosted(test_set=folder / "test.csv") as code:
        await code.open()
        await code.write_initial(folder / "first", {})
        code.rest()  # which it does not: there is a test set
        before, process = await code.measure(folder / "first"), pid(code)
        assert [(metric.name, metric.examples) for metric in before] == [("loss", 2), ("worst", 2)]
        (folder / "crash").touch()
        with pytest.raises(TaskProcessGone, match=r"^the process that runs the task's code was ended by SIGKILL before"):
            await code.measure(folder / "first")
        assert await code.measure(folder / "first") == before
        assert pid(code) != process
        (folder / "hang").touch()
        measuring = asyncio.create_task(code.measure(folder / "first"))
        while (folder / "hang").exists():
            await asyncio.sleep(0.01)
        measuring.cancel()
        with pytest.raises(asyncio.CancelledError):
            await measuring
        assert await code.measure(folder / "first") == before


Spoil = Callable[[str], str]


@pytest.mark.parametrize(
    ("reference", "spoil", "kind", "told"),
    [
        ("plane", str, TaskError, r"task 'plane': write it as module:attribute"),
        ("plane:model", str, TaskError, r"task 'plane:model': is a function; a choral.Task is expected"),
        (
            "plane:task",
            lambda source: source.replace("def model():", "def model():\n    raise ZeroDivisionError('no layers')"),
            TaskError,
            r"^task plane: model\(\) raised ZeroDivisionError: no layers$",
        ),
        ("plane:task", lambda source: source.replace('"y"', '"z"'), DataError, r"test.csv: column z is missing"),
        (
            "plane:task",
            lambda source: source + "sys.exit(5)\n",
            TaskProcessGone,
            "^the process that runs the task's code ended with exit code 5 before it answered: see what it printed$",
        ),
    ],
)
async def test_what_is_wrong_with_a_task_is_told_as_if_it_had_been_here(
    folder: Path, reference: str, spoil: Spoil, kind: type[Exception], told: str
) -> None:
    (folder / "plane.py").write_text(spoil(TASK))
    async with hosted(reference, folder / "test.csv") as code:
        with pytest.raises(kind, match=told) as refused:
            await code.open()
        assert type(refused.value) is kind


async def test_a_place_that_cannot_be_written_is_an_os_error(folder: Path) -> None:
    async with hosted() as code:
        await code.open()
        with pytest.raises(OSError, match="nowhere"):
            await code.write_initial(folder / "nowhere" / "first", {})
