"""A coordinator's state folder over real files and a real database, without the process around it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from choral.config import parse
from choral.durable import write_durably
from choral.messages import VersionRef
from choral.metrics import Metric
from choral.table import Table
from choral.task import Task
from choral_server.artifacts import Artifacts, FolderArtifacts
from choral_server.blueprint import Blueprint
from choral_server.checkpoints import Checkpoints
from choral_server.config import ServerConfig
from choral_server.database import Database
from choral_server.history_key import key_for
from choral_server.lease import Lease
from choral_server.run import Run, Runs
from choral_server.store import Store
from choral_server.task_host import TaskHost
from choral_server.troubles import Troubles
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset
from vectors import flatten

NOON = datetime(2025, 6, 1, 12, tzinfo=UTC)
PLAIN = Task("plane", lambda: nn.Linear(2, 1), mse_loss, Table(["a", "b"], target="y"))


def config(run: dict[str, Any] | None = None, **changes: Any) -> ServerConfig:
    least = {"listen": "127.0.0.1:0", "plaintext": True, "state": "unused", "task": "tests:plane"}
    return parse({**least, "run": {"rounds": 3, "cohort_size": 2, **(run or {})}, **changes}, ServerConfig, "server.yaml")


class Here:
    """A task's code without the process around it: tests have tasks that no other process could import."""

    def __init__(self, task: Task, seed: int, test_set: TensorDataset | None = None) -> None:
        self._host = TaskHost(task, seed, test_set)
        self.blueprint: Blueprint = self._host.blueprint()

    async def write_initial(self, path: Path, metadata: dict[str, str]) -> None:
        self._host.write_initial(path, metadata)

    async def measure(self, path: Path) -> tuple[Metric, ...]:
        return self._host.measure(path)


def weights(run: Run) -> NDArray[np.float32]:
    """The flat vector of a run's newest version."""
    return flatten(load_file(run.checkpoints.path(run.version.number)), run.model.manifest)


async def write_version(checkpoints: Checkpoints, number: int, content: bytes, state: bytes | None = None) -> VersionRef:
    """Store a version with these bytes."""

    async def make(path: Path, state_path: Path) -> bytes:
        write_durably(path, content)
        if state is not None:
            write_durably(state_path, state)
        return hashlib.sha256(content).digest()

    return await checkpoints.publish(await checkpoints.draft(number, make))


class Home:
    """A coordinator's state folder, and the process that has it: `restart` ends that without a word, and begins another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.artifacts: Artifacts = FolderArtifacts(folder)
        self.troubles = Troubles()
        self.database: Database
        self.store: Store

    async def start(self) -> None:
        self.troubles = Troubles()
        self.database = await Database.open(f"sqlite:///{self.folder / 'choral.db'}", self.troubles)
        lease = await Lease.take(self.database, "here", 3600.0)
        self.store = await Store.open(self.database, lease, await key_for(self.folder, self.database))

    async def end(self) -> None:
        await self.database.close()

    async def restart(self) -> None:
        await self.end()
        await self.start()

    def runs(self, settings: ServerConfig | None = None, task: Task = PLAIN, test_set: TensorDataset | None = None) -> Runs:
        settings = settings or config()
        keep = settings.run.keep_versions
        code = Here(task, settings.run.seed, test_set)
        return Runs(settings, code, self.store, lambda run: Checkpoints(self.artifacts, self.folder, run, keep), self.troubles)

    async def open(self, settings: ServerConfig | None = None, task: Task = PLAIN, test_set: TensorDataset | None = None) -> Run:
        return await self.runs(settings, task, test_set).open(NOON)

    async def reopen(self, settings: ServerConfig | None = None, task: Task = PLAIN) -> Run:
        await self.restart()
        return await self.runs(settings, task).open(NOON + timedelta(hours=1))

    async def next_trouble(self) -> str:
        """The subject of the first trouble."""
        found = asyncio.Event()
        self.troubles.on_change = found.set
        while not self.troubles.present:
            found.clear()
            await found.wait()
        return next(iter(self.troubles.present))


@pytest.fixture
async def home(tmp_path: Path) -> AsyncIterator[Home]:
    started = Home(tmp_path)
    await started.start()
    yield started
    await started.end()
