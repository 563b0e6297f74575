"""A task's code as the coordinator uses it, which has neither that code nor torch itself."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from choral.errors import ConfigError
from choral.metrics import Metric

from choral_server.blueprint import Blueprint
from choral_server.task_process import TaskProcess


class TaskCode(Protocol):
    """What the coordinator wants of a task's code."""

    @property
    def blueprint(self) -> Blueprint:
        """What the task is."""

    async def write_initial(self, path: Path, metadata: dict[str, str]) -> None:
        """Write the initial weights as a safetensors file. Raises TaskError, or OSError."""

    async def measure(self, path: Path) -> tuple[Metric, ...]:
        """Loss and metrics of a version on the test set. Raises TaskError; TaskProcessGone: try again."""


class HostedTask:
    """The code in a process of its own.

    With a test set it stays there, and so does torch: the coordinator's memory is its own, it goes on answering whatever the task's
    code does with the interpreter's lock, and outlives it. Without one the process ends once `rest` is called; it is started anew
    when it is needed.
    """

    def __init__(self, process: TaskProcess, reference: str, seed: int, test_set: Path | None) -> None:
        self._process: TaskProcess | None = process
        self._asked = {"task": reference, "seed": seed, "test_set": str(test_set) if test_set is not None else None}
        self._opened: Blueprint | None = None

    @property
    def blueprint(self) -> Blueprint:
        """What the task is, once it is open."""
        assert self._opened is not None, "it is opened first"
        return self._opened

    async def open(self) -> None:
        """Import the task. Raises TaskError, or DataError: its test set cannot be used."""
        assert self._process is not None
        self._opened = Blueprint.from_json(await self._process.ask("open", **self._asked))

    async def write_initial(self, path: Path, metadata: dict[str, str]) -> None:
        """Write the initial weights."""
        await (await self._there()).ask("initial", path=str(path), metadata=metadata)

    async def measure(self, path: Path) -> tuple[Metric, ...]:
        """Loss and metrics of a version on the test set."""
        told = await (await self._there()).ask("measure", path=str(path))
        return tuple(Metric(*one) for one in told)

    def rest(self) -> None:
        """Nothing is wanted of it for now."""
        if self._process is not None and self._asked["test_set"] is None:
            self._process.end()
            self._process = None

    async def end(self) -> None:
        """Let the process end, and wait until it has."""
        if self._process is not None:
            ending, self._process = self._process, None
            ending.end()
            await ending.gone()

    async def _there(self) -> TaskProcess:
        """The process; a new one if it has ended. Raises ConfigError: the task is another meanwhile."""
        if self._process is not None and self._process.running:
            return self._process
        await self.end()
        started = TaskProcess()
        self._process = started
        if Blueprint.from_json(await started.ask("open", **self._asked)) != self._opened:
            await self.end()
            raise ConfigError(f"task {self._asked['task']!r} is not what it was when the coordinator started: start it again")
        return started
