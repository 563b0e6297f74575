"""A run: one task trained for a number of rounds; what comes next, and the model as it stands."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from choral.errors import ConfigError
from choral.messages import VersionRef
from choral.metrics import Metric, weighted_mean
from choral.plan import Kind
from choral.statistics import merge_all
from choral.task import Task
from torch.utils.data import Dataset

from choral_server import objective
from choral_server.aggregate import WeightedSum
from choral_server.checkpoints import BEST, LATEST, Checkpoints
from choral_server.config import ServerConfig
from choral_server.global_model import GlobalModel
from choral_server.rounds import PartState, Round
from choral_server.statistics_sum import StatisticsSum
from choral_server.store import OVER, RunRecord, RunState, Store, VersionRecord
from choral_server.strategies import fedavg

Aggregate = WeightedSum | StatisticsSum | None


@dataclass(frozen=True)
class Evaluators:
    """Who measures versions: the coordinator, if it has a test set, and the clients, if they are asked to."""

    test_set: Dataset[Any] | None
    clients: bool
    judge: str

    @classmethod
    def of(cls, config: ServerConfig, test_set: Dataset[Any] | None) -> Evaluators:
        """As the configuration says; versions are judged on the test set unless it says otherwise or there is none."""
        return cls(test_set, config.evaluation.clients, config.run.objective.on or ("test" if test_set is not None else "clients"))


class Run:
    """The run that the coordinator is on. `record` is its state, replaced as a whole and stored before anyone hears of it."""

    def __init__(self, config: ServerConfig, task: Task, test_set: Dataset[Any] | None, store: Store, record: RunRecord) -> None:
        self.settings = config.run
        self.training = config.run.training.over(task.training)
        self.record = record
        self.model = GlobalModel(task, config.run.seed)
        self.checkpoints = Checkpoints(store.run_folder(record.name) / "versions", config.run.keep_versions)
        self.version: VersionRef
        self._store = store
        self._evaluators = Evaluators.of(config, test_set)
        self._evaluation_tried = False

    def begin(self, now: datetime, parent: Path | None = None) -> None:
        """Make version 0: the task's initial weights, or those in the checkpoint `parent`."""
        if parent is not None:
            self.model.load(parent)
        self.publish(self._write(0), None, now)

    def resume(self, now: datetime) -> None:
        """Go on from the latest version of an earlier process. Raises ConfigError: it is missing or of another model."""
        path = self.checkpoints.path(self.record.latest)
        if not path.exists():
            raise ConfigError(
                f"{path}: is missing, though run {self.record.name} had got that far: restore it, or give run.name another value"
            )
        self.model.load(path)
        self.version = self.checkpoints.reference(self.record.latest)
        self.checkpoints.point(LATEST, self.record.latest)  # the earlier process may have ended before it did
        self._store.save(self.record, VersionRecord(self.record.name, self.version, path, now))

    def save(self, **changes: Any) -> None:
        """Replace parts of the record and store it."""
        self.record = replace(self.record, **changes)
        self._store.save(self.record)

    @property
    def over(self) -> bool:
        """Whether the run has ended for good."""
        return self.record.state in OVER

    @property
    def active(self) -> bool:
        """Whether rounds may open: it is neither over nor failed."""
        return not self.over and self.record.state is not RunState.FAILED

    @property
    def clients_measure(self) -> bool:
        """Whether clients measure versions on their held-out examples."""
        return self._evaluators.clients

    def next_kind(self) -> Kind | None:
        """What the next round is for; None: the run is complete."""
        if self.model.features is not None and not self.record.has_statistics:
            return Kind.STATISTICS
        early = objective.exhausted(self.settings.objective, self.record.progress)
        if self.record.rounds_done < self.record.rounds_planned and not early:
            return Kind.TRAINING
        if self._evaluators.clients and not self._evaluation_tried:
            return Kind.EVALUATION
        return None

    def outcome(self) -> str:
        """Why a complete run is complete."""
        record, progress = self.record, self.record.progress
        if record.rounds_done >= record.rounds_planned:
            return f"{record.rounds_done} rounds completed"
        metric = self.settings.objective.metric
        return f"stopped early after {record.rounds_done} rounds: {metric} has not improved on version {progress.best}"

    def aggregate(self, kind: Kind) -> Aggregate:
        """An empty aggregate for a round of this kind."""
        if kind is Kind.TRAINING:
            return WeightedSum(self.model.manifest.size, self.settings.weight_cap)
        return StatisticsSum() if kind is Kind.STATISTICS else None

    def make_version(self, aggregate: WeightedSum | StatisticsSum) -> VersionRef:
        """Take an aggregate into the model and write its checkpoint. Slow for large models: call it in a thread."""
        if isinstance(aggregate, StatisticsSum):
            self.model.set_statistics(merge_all(aggregate.parts()))
        else:
            self.model.set_weights(fedavg.step(self.model.weights, aggregate.mean()))
        return self._write(self.record.latest + 1)

    def publish(self, version: VersionRef, kind: Kind | None, now: datetime) -> None:
        """Make a written version the current one; `kind` is that of the round that gave it, None for version 0."""
        done = self.record.rounds_done + (kind is Kind.TRAINING)
        statistics = self.record.has_statistics or kind is Kind.STATISTICS
        self.version = version
        self.record = replace(self.record, latest=version.number, rounds_done=done, has_statistics=statistics)
        path = self.checkpoints.path(version.number)
        self._store.save(self.record, VersionRecord(self.record.name, version, path, now))
        self.checkpoints.point(LATEST, version.number)
        best = self.record.progress.best
        self.checkpoints.prune({version.number} if best is None else {version.number, best})

    @property
    def has_test_set(self) -> bool:
        """Whether the coordinator measures versions itself."""
        return self._evaluators.test_set is not None

    def measure(self) -> tuple[Metric, ...]:
        """Measure the model on the coordinator's test set, if it has one. Slow for large models: call it in a thread."""
        return self.model.evaluate(self._evaluators.test_set) if self._evaluators.test_set is not None else ()

    def measured(self, on: str, number: int, metrics: tuple[Metric, ...]) -> None:
        """Keep what was measured of a version, and whether that makes it the best."""
        if not metrics:
            return
        record = self._store.versions.get((self.record.name, number))
        if record is not None:
            self._store.save(replace(record, test=metrics) if on == "test" else replace(record, clients=metrics))
        if on != self._evaluators.judge:
            return
        progress = objective.judge(self.settings.objective, self.record.progress, number, metrics)
        if progress.best is not None and progress.best != self.record.progress.best:
            self.checkpoints.point(BEST, progress.best)
        self.save(progress=progress)

    def measured_by_clients(self, closed: Round) -> None:
        """Keep the weighted mean of what clients measured on the version that a round started from."""
        self._evaluation_tried = closed.kind is Kind.EVALUATION
        accepted = [part for part in closed.parts.values() if part.state is PartState.ACCEPTED]
        self.measured("clients", closed.version, weighted_mean(metric for part in accepted for metric in part.held_out))

    def _write(self, number: int) -> VersionRef:
        record = self.record
        origin = {"run": record.name, "task": record.task, "task_version": record.task_version, "version": number}
        return self.checkpoints.write(number, self.model.to_bytes({"choral": json.dumps(origin)}))


def open_run(config: ServerConfig, task: Task, test_set: Dataset[Any] | None, store: Store, now: datetime) -> Run:
    """The newest run of the configured name, as an earlier process left it, or a new one.

    Raises ConfigError: the run in the state folder is of another task or model, or damaged.
    """
    name, last = _newest(config.run.name, store)
    if last is None:
        return _begin(config, task, test_set, store, RunRecord(name, task.name, task.version, config.run.rounds, now))
    if (last.task, last.task_version) != (task.name, task.version):
        raise ConfigError(
            f"run {last.name} in {store.run_folder(last.name)} trains task {last.task} {last.task_version}, "
            f"not {task.name} {task.version}: give run.name another value"
        )
    planned = config.run.rounds if last.name == config.run.name else last.rounds_planned
    unfinished = last.state not in OVER or (last.state is RunState.FINISHED and last.rounds_done < planned)
    if unfinished:
        last = replace(last, rounds_planned=planned, state=RunState.WAITING, reason="")
    run = Run(config, task, test_set, store, last)
    run.resume(now)
    return run


def further_run(
    config: ServerConfig, task: Task, test_set: Dataset[Any] | None, store: Store, now: datetime, rounds: int, parent: Run | None
) -> Run:
    """A new run with the next free number behind its name: `rounds` (0: as configured), from the model of `parent` if given."""
    name, _ = _newest(config.run.name, store)
    record = RunRecord(name, task.name, task.version, rounds or config.run.rounds, now)
    if parent is None:
        return _begin(config, task, test_set, store, record)
    record = replace(record, has_statistics=parent.record.has_statistics)
    return _begin(config, task, test_set, store, record, parent.checkpoints.path(parent.record.latest))


def _begin(
    config: ServerConfig, task: Task, test_set: Dataset[Any] | None, store: Store, record: RunRecord, parent: Path | None = None
) -> Run:
    run = Run(config, task, test_set, store, record)
    run.begin(record.started_at, parent)
    return run


def _newest(base: str, store: Store) -> tuple[str, RunRecord | None]:
    """The first free name of base, base-2, base-3, …, and the run before it."""
    last = None
    for number in itertools.count(1):
        name = base if number == 1 else f"{base}-{number}"
        record = store.load_run(name)
        if record is None:
            return name, last
        last = record
    raise AssertionError("count never ends")
