"""What the coordinator knows: runs, rounds, versions and clients, and whoever watches them change.

The state of a run that must survive a restart (how far it is, which version is current) is a small JSON file that is replaced
atomically. Rounds, clients and measurements are kept in memory, the newest first.
"""

from __future__ import annotations

import asyncio
import enum
import json
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from choral.errors import ConfigError
from choral.messages import VersionRef
from choral.metrics import Metric

from choral_server.objective import Progress
from choral_server.rounds import Round

K = TypeVar("K")
R = TypeVar("R")
_KEPT = 1000  # rounds and versions held in memory
_UNREAD = 10_000  # states that a slow watcher may be behind; older ones are dropped


class RunState(enum.Enum):
    """Where a run stands."""

    WAITING = "waiting"
    IN_ROUND = "in round"
    PAUSED = "paused"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


OVER = frozenset({RunState.FINISHED, RunState.STOPPED})


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run: how far it is, and why it stands where it stands."""

    name: str
    task: str
    task_version: str
    rounds_planned: int
    started_at: datetime
    state: RunState = RunState.WAITING
    reason: str = ""
    rounds_done: int = 0
    next_round: int = 0
    latest: int = 0
    has_statistics: bool = False
    paused: bool = False
    progress: Progress = Progress()
    next_round_at: datetime | None = None
    opened_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """A version: where it is, and how good."""

    run: str
    version: VersionRef
    checkpoint: Path
    published_at: datetime
    test: tuple[Metric, ...] = ()
    clients: tuple[Metric, ...] = ()


@dataclass(frozen=True, slots=True)
class ClientRecord:
    """A client that has attended since the coordinator started; `accepted` counts its results."""

    name: str
    attending: bool
    examples: int
    software: str
    address: str
    heard_at: datetime
    accepted: int = 0
    reason: str = ""


Record = RunRecord | Round | VersionRecord | ClientRecord


class Store:
    """The records. `save` makes a change known to all readers and watchers at once."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.runs: OrderedDict[str, RunRecord] = OrderedDict()
        self.rounds: OrderedDict[tuple[str, int], Round] = OrderedDict()
        self.versions: OrderedDict[tuple[str, int], VersionRecord] = OrderedDict()
        self.clients: dict[str, ClientRecord] = {}
        self._watchers: set[_Watcher] = set()

    def run_folder(self, run: str) -> Path:
        """Where a run keeps its state and its versions."""
        return self._folder / "runs" / run

    def save(self, *records: Record) -> None:
        """Keep the records, each in place of its predecessor; a run's durable part is on disk when this returns."""
        for record in records:
            match record:
                case RunRecord():
                    self._save_run(record)
                case Round():
                    _keep(self.rounds, (record.run, record.number), record)
                case VersionRecord():
                    _keep(self.versions, (record.run, record.version.number), record)
                case ClientRecord():
                    self.clients[record.name] = record
            for watcher in self._watchers:
                watcher.tell(record)

    def load_run(self, name: str) -> RunRecord | None:
        """A run as an earlier process left it, or None. Raises ConfigError: its file is damaged."""
        path = self.run_folder(name) / "run.json"
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            content |= {
                "state": RunState(content["state"]),
                "progress": Progress(**content["progress"]),
                "started_at": datetime.fromisoformat(content["started_at"]),
            }
            if content["opened_at"] is not None:
                content["opened_at"] = datetime.fromisoformat(content["opened_at"])
            return RunRecord(**content)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: is damaged ({error}): give the run another name, or restore the file") from error

    async def watch(self) -> AsyncIterator[Record]:
        """All runs and clients as they are, then every change; a reader that is behind gets only the newest state of each."""
        watcher = _Watcher()
        present: list[Record] = [*self.runs.values(), *self.clients.values()]
        for record in present:
            watcher.tell(record)
        self._watchers.add(watcher)
        try:
            while not watcher.ended or watcher.behind:
                for record in await watcher.news():
                    yield record
        finally:
            self._watchers.discard(watcher)

    def end_watches(self) -> None:
        """End every watch after what it has not read yet."""
        for watcher in self._watchers:
            watcher.end()

    def _save_run(self, record: RunRecord) -> None:
        before = self.runs.get(record.name)
        durable = replace(record, next_round_at=None)
        if before is None or replace(before, next_round_at=None) != durable:
            content = asdict(durable)
            del content["next_round_at"]
            content |= {"state": record.state.value, "started_at": record.started_at.isoformat()}
            content["opened_at"] = record.opened_at.isoformat() if record.opened_at is not None else None
            _replace_file(self.run_folder(record.name) / "run.json", json.dumps(content, indent=1))
        self.runs[record.name] = record


class _Watcher:
    """What one reader has not read yet: the newest state of each run, round, version and client that changed."""

    def __init__(self) -> None:
        self.ended = False
        self._news: dict[tuple[object, ...], Record] = {}
        self._any = asyncio.Event()

    @property
    def behind(self) -> bool:
        return bool(self._news)

    def tell(self, record: Record) -> None:
        key = _key(record)
        self._news.pop(key, None)  # so that it moves to the end
        self._news[key] = record
        if len(self._news) > _UNREAD:
            del self._news[next(iter(self._news))]
        self._any.set()

    def end(self) -> None:
        self.ended = True
        self._any.set()

    async def news(self) -> list[Record]:
        await self._any.wait()
        self._any.clear()
        unread, self._news = self._news, {}
        return list(unread.values())


def _key(record: Record) -> tuple[object, ...]:
    match record:
        case Round():
            return Round, record.run, record.number
        case VersionRecord():
            return VersionRecord, record.run, record.version.number
        case RunRecord() | ClientRecord():
            return type(record), record.name


def newest(records: Iterable[R], limit: int) -> list[R]:
    """The last `limit` records, newest first."""
    return list(records)[::-1][:limit]


def _keep(kept: OrderedDict[K, R], key: K, record: R) -> None:
    kept[key] = record
    if len(kept) > _KEPT:
        kept.popitem(last=False)


def _replace_file(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
