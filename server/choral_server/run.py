"""A run: one task trained for a number of rounds; what comes next, and the model as it stands."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from choral.codecs import MASKED, Lengths, negotiated
from choral.errors import ConfigError, TaskProcessGone, UnknownVersion
from choral.forms import rounded_names
from choral.messages import VersionRef
from choral.metrics import LOSS, Metric, weighted_mean
from choral.plan import Kind, Plan, digest_of
from choral.secagg.fixed_point import FixedPoint
from choral.secagg.summand import Layout, layout_of
from numpy.typing import NDArray

from choral_server import objective, private_rounds
from choral_server.aggregate import WeightedSum
from choral_server.checkpoints import BEST, LATEST, Checkpoints, Make
from choral_server.config import ServerConfig
from choral_server.failpoints import Transition
from choral_server.global_model import GlobalModel
from choral_server.grouped_sum import GroupedSum
from choral_server.intake import digest_of as digest_of_file
from choral_server.intake import payload_bytes
from choral_server.ledger import Ledger
from choral_server.masked_sum import MaskedSum
from choral_server.noised_sum import NoisedStatistics, NoisedSum
from choral_server.offload import offload
from choral_server.optimizer_state import OptimizerState, StateWriter
from choral_server.patience import STORES, patiently
from choral_server.private_means import PrivateStatistics
from choral_server.private_rounds import PrivateRounds
from choral_server.private_sum import PrivateSum
from choral_server.records import (
    OVER,
    EventRecord,
    Origin,
    Record,
    RunRecord,
    RunState,
    SpendingRecord,
    VersionRecord,
)
from choral_server.rounds import PartState, Round, published
from choral_server.statistics_sum import StatisticsSum
from choral_server.store import Store
from choral_server.strategies import step
from choral_server.task_code import TaskCode
from choral_server.troubles import Troubles
from choral_server.version_forms import VersionForms

Masked = MaskedSum | GroupedSum | NoisedSum
"""what is added behind masks, of which a restart can make nothing"""
Aggregate = WeightedSum | StatisticsSum | Masked | PrivateSum | PrivateStatistics | NoisedStatistics | None
ARTIFACTS, EVALUATION = "artifacts", "evaluation"
_NAMED = 10  # versions named in a message


@dataclass(frozen=True)
class Evaluators:
    """Who measures versions: the coordinator, if it has a test set, and the clients, if they are asked to."""

    coordinator: bool
    clients: bool
    judge: str

    @classmethod
    def of(cls, config: ServerConfig) -> Evaluators:
        """As the configuration says; versions are judged on the test set unless it says otherwise or there is none."""
        here = config.evaluation.test_set is not None
        return cls(here, config.evaluation.clients, config.run.objective.on or ("test" if here else "clients"))


class Run:
    """The run that the coordinator is on. `record` is its state, `current` its newest version; both change once they are stored."""

    def __init__(
        self,
        config: ServerConfig,
        code: TaskCode,
        store: Store,
        checkpoints: Checkpoints,
        troubles: Troubles,
        record: RunRecord,
    ) -> None:
        self.settings = config.run
        self.training = config.run.training.over(code.blueprint.training)
        self.record = record
        self.model = GlobalModel(code.blueprint)
        self.checkpoints = checkpoints
        self.current: VersionRecord
        self._code = code
        self._state: OptimizerState | None = None  # that belongs to the weights
        self._sum: WeightedSum | None = None  # of the last round, to be used again
        blueprint, size = code.blueprint, self.model.manifest.size
        terms = config.run, record.name, size, self.metrics, blueprint.ranges, store
        self.private = PrivateRounds(*terms) if config.run.privacy is not None else None
        self._store = store
        self._troubles = troubles
        self._evaluators = Evaluators.of(config)
        self._forms = VersionForms(config.run.compression.download, rounded_names(self.model.manifest))
        self._put_to_clients: int | None = None  # the version that a round was opened for only to measure it
        self._changing = asyncio.Lock()

    async def begin(self, now: datetime, parent: Run | None = None, *others: Record) -> None:
        """Make version 0: the task's initial weights, or the newest of `parent`; `others` are stored with it."""

        async def initial(weights: Path, _: Path) -> bytes:
            metadata = self._metadata(0)
            if parent is not None:
                return await asyncio.to_thread(parent.model.write, weights, metadata)
            await self._code.write_initial(weights, metadata)
            return await offload(weights.stat().st_size, _synced, weights)

        made = await self._write(initial, 0, now, parent.origin if parent is not None else None)
        self.current = await self._with_forms(made, None)
        self._take(0, *self.checkpoints.here(0))
        await self._commit(lambda record: record, Transition.RUN_BEGUN, self.current, *others)

    async def resume(self) -> None:
        """Go on from the newest version of an earlier process. Raises ConfigError: it is missing or of another model."""
        latest, before = [await self._store.version(self.record.name, self.record.latest - ago) for ago in (0, 1)]
        if latest is None:
            raise ConfigError(f"run {self.record.name}: the database has no version {self.record.latest}: restore a backup")
        await self.checkpoints.fetch(self.record.latest, latest.version)
        self.current = await self._with_forms(latest, before)
        await self._load(self.record.latest)
        self._point()  # the earlier process may have ended before it did

    async def save(self, at: Transition | None = None, others: Iterable[Record] = (), **changes: Any) -> None:
        """Store the record with these changes, and other records in the same commit. A run that is over stays so."""
        async with self._changing:
            if self.over:
                changes = {name: value for name, value in changes.items() if name not in ("state", "reason")}
            record = replace(self.record, **changes)
            if replace(record, next_round_at=self.record.next_round_at) == self.record and not others:
                self._store.tell(record)  # only what is true of the moment differs
            else:
                await self._store.commit(record, *others, at=at)
            self.record = record

    @property
    def version(self) -> VersionRef:
        """The newest version, as it is announced."""
        return self.current.version

    @property
    def origin(self) -> Origin:
        """The newest version, as what is made from it names it."""
        return Origin(self.record.name, self.version.number, self.version.digest)

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
        if self._evaluators.clients and not self.current.clients and self._put_to_clients != self.version.number:
            return Kind.EVALUATION
        return None

    def outcome(self) -> str:
        """Why a complete run is complete."""
        record, progress = self.record, self.record.progress
        if record.rounds_done >= record.rounds_planned:
            return f"{record.rounds_done} rounds completed"
        metric = self.settings.objective.metric
        return f"stopped early after {record.rounds_done} rounds: {metric} has not improved on version {progress.best}"

    def plan(self, kind: Kind, goal: int, seed: int) -> Plan:
        """What a client is asked to do in a round of this kind that is to be made of `goal` results."""
        evaluate, secure = kind is not Kind.STATISTICS and self.clients_measure, None
        private = self.private.plan(kind, goal, evaluate) if self.private is not None else None
        if (settings := self.settings.secure_aggregation) is not None:
            name = f"{self.record.name}/{self.record.nonce}"
            secure = settings.plan(kind, name, goal, self.settings.cap, self.settings.max_update_norm)
            if self.private is not None and private is not None:
                secure = self.private.secure(secure, kind, private)
        noised = self.private is not None
        common = self.record.task, self.record.task_version, self.training, seed, evaluate, goal
        hiding = self.settings.example_privacy
        examples = hiding.plan(kind, self.model.blueprint.ranges) if hiding is not None else None
        return Plan(kind, *common, secure, noised, private, examples)

    def layout(self, plan: Plan) -> Layout:
        """How a result that is summed securely is laid out."""
        return layout_of(plan, self.model.manifest.size, self.model.features, self.metrics)

    @property
    def metrics(self) -> tuple[str, ...]:
        """What clients measure."""
        return (LOSS, *self.model.blueprint.metrics)

    def plan_digest(self, kind: Kind, goal: int) -> bytes:
        """SHA-256 of what all clients of a round are asked."""
        return digest_of(self.plan(kind, goal, 0))

    def codec(self, kind: Kind, offered: Collection[str]) -> str:
        """How a client with these abilities sends its result; empty: as it is."""
        if self.settings.secure_aggregation is not None:
            return MASKED
        return negotiated(self.settings.compression.codec, offered).name if kind is Kind.TRAINING else ""

    def payload_bytes(self, kind: Kind, codec: str) -> Lengths:
        """How long a result may be; of one that is not encoded, if no codec is given, unless all are masked."""
        if self.settings.secure_aggregation is not None and codec in ("", MASKED):
            length = self.layout(self.plan(kind, self.settings.secure_aggregation.minimum_cohort, 0)).payload_bytes
            return Lengths(length, length)
        return payload_bytes(kind, self.model.manifest.size, self.model.features, codec)

    @property
    def ledger(self) -> Ledger | None:
        """The privacy budget; None: nothing is private."""
        return self.private.ledger if self.private is not None else None

    def spending(self, round: Round) -> SpendingRecord | None:
        """What was set aside of the privacy budget for a round."""
        return self._store.spendings.get((round.run, round.number))

    def asked(self, round: Round) -> int:
        """Of how many results clients are told that a round is to be made: in a private one not how many were drawn."""
        spending = self.spending(round)
        return round.goal if spending is None else spending.release.expected

    def suits(self, round: Round) -> bool:
        """Whether an earlier process opened a round as this one would."""
        if self.private is None:
            return self.spending(round) is None
        return self.private.suits(round)

    def returned(self, before: Round, after: Round) -> tuple[SpendingRecord, ...]:
        """What comes back of the privacy budget from a round that was abandoned."""
        return private_rounds.returned(self.spending(after), before, after)

    def aggregate(self, kind: Kind, goal: int, spending: SpendingRecord | None = None) -> Aggregate:
        """An empty aggregate for a round of this kind that is to be made of `goal` results; there is one at a time.

        `spending` is what was set aside for it, if it is private.
        """
        plan, settings = self.plan(kind, goal, 0), self.settings.secure_aggregation
        if self.private is not None:
            assert spending is not None, "a private round is opened with it, and one that was not is given up"
            return self.private.aggregate(kind, spending, plan)
        if settings is not None and plan.secure is not None:
            layout, secure = self.layout(plan), plan.secure
            scale = FixedPoint(secure.clip, secure.fraction_bits, secure.ring_bits, goal)
            sums = [MaskedSum(layout, scale, plan.secure, self.metrics) for _ in range(settings.groups_of(kind))]
            return sums[0] if len(sums) == 1 else GroupedSum(sums)
        if kind is Kind.TRAINING:
            self._sum = self._sum or WeightedSum(self.model.manifest.size, self.settings.cap)
            return self._sum.emptied()
        return StatisticsSum() if kind is Kind.STATISTICS else None

    def make_version(self, kind: Kind, aggregate: Aggregate, weights: Path, state: Path) -> bytes:
        """Write the next version, and the optimizer's state, from what a round collected; the version's SHA-256.

        Goes through the model in blocks: neither the present weights nor the next are ever whole in memory. Slow for large models:
        call it in a thread. Raises OSError.
        """
        metadata = self._metadata(self.record.latest + 1)
        if kind is Kind.STATISTICS:
            assert isinstance(aggregate, StatisticsSum | MaskedSum | PrivateStatistics | NoisedSum | NoisedStatistics), "of updates"
            if self._state is not None:
                self._state.copy(state)
            return self.model.write_standardized(weights, metadata, aggregate.moments())
        assert isinstance(aggregate, WeightedSum | PrivateSum | Masked), "the others are of statistics"
        with StateWriter(state, self.model.manifest.size) as writer:

            def next_weights(present: NDArray[np.float32], start: int) -> NDArray[np.float32]:
                stop = start + present.size
                before = self._state.part(start, stop) if self._state is not None else {}
                after, kept = step(self.settings.strategy, present, aggregate.mean(start, stop), before)
                writer.write(start, kept)
                return after

            return self.model.write_trained(weights, metadata, next_weights)

    async def open(self, opened: Round, spending: SpendingRecord | None = None) -> None:
        """Store a round, and what it costs in privacy, before anyone hears of it."""
        if opened.kind is Kind.EVALUATION:
            self._put_to_clients = opened.version  # once: what nobody measures stays unmeasured
        await self.save(
            at=Transition.ROUND_OPENED,
            others=(opened,) if spending is None else (opened, spending),
            state=RunState.IN_ROUND,
            reason="",
            next_round=opened.number + 1,
            next_round_at=None,
            opened_at=opened.opened_at if opened.kind is Kind.TRAINING else self.record.opened_at,
        )

    async def settle(self, closed: Round, aggregate: Aggregate, now: datetime) -> Round:
        """Use what a closed round collected: publish its version, if it makes one, and what clients measured; in one commit."""
        progress, before = self._judged("clients", self._measured(closed, aggregate))
        done = published(closed)
        parent = Origin(closed.run, closed.version, closed.parent)
        if aggregate is None or closed.kind is Kind.EVALUATION:
            others: tuple[Record, ...] = (before, done, *self._spent(closed, aggregate))
            await self._commit(lambda record: replace(record, progress=progress), Transition.VERSION_PUBLISHED, *others)
            self.current = before
            return done
        if isinstance(aggregate, PrivateSum):
            await offload(self.version.size_bytes, aggregate.release)
        training, statistics = closed.kind is Kind.TRAINING, closed.kind is Kind.STATISTICS
        await self._publish(
            lambda weights, state: offload(self.version.size_bytes, self.make_version, closed.kind, aggregate, weights, state),
            lambda record: replace(
                record,
                progress=progress,
                rounds_done=record.rounds_done + training,
                has_statistics=record.has_statistics or statistics,
            ),
            now,
            parent,
            before,
            done,
            *self._spent(closed, aggregate),
        )
        return done

    def _measured(self, closed: Round, aggregate: Aggregate) -> tuple[Metric, ...]:
        """What the clients of a closed round have measured, together."""
        if isinstance(aggregate, Masked):
            return aggregate.held_out()
        if self.private is not None:
            return self.private.measured(closed)
        accepted = [part for part in closed.parts.values() if part.state is PartState.ACCEPTED]
        cap = self.settings.cap
        return weighted_mean(replace(m, examples=min(m.examples, cap)) for part in accepted for m in part.held_out)

    def _spent(self, closed: Round, aggregate: Aggregate) -> tuple[SpendingRecord, ...]:
        """What is spent of the privacy budget with a round."""
        within = aggregate.within if isinstance(aggregate, PrivateSum | NoisedSum) else None
        return self.private.spent(closed, within) if self.private is not None else ()

    async def can_go_back_to(self, number: int) -> VersionRef:
        """A version that is at hand. Raises UnknownVersion: it never was, or is not kept; ConfigError: it is damaged."""
        known = await self._store.version(self.record.name, number)
        if known is None:
            raise UnknownVersion(f"run {self.record.name} has no version {number}: `choral versions list` shows those there are")
        if number not in (kept := await self.checkpoints.numbers()):
            there = ", ".join(map(str, kept[-_NAMED:]))
            raise UnknownVersion(f"version {number} is not kept any more (run.keep_versions): the newest that are, are {there}")
        await self.checkpoints.fetch(number, known.version)
        return known.version

    async def roll_back(self, number: int, now: datetime) -> None:
        """Publish the weights and the optimizer state of version `number` as the newest. Raises as `can_go_back_to`."""
        known = await self.can_go_back_to(number)
        await self._load(number)
        new = self.record.latest + 1
        event = EventRecord(now, "rolled back", f"the model is again that of version {number}, as version {new}", self.record.name)
        measured = self.record.has_statistics and self.model.standardizes  # or the version is from before they were measured
        await self._publish(
            lambda weights, state: asyncio.to_thread(self._copy, weights, state, new),
            lambda record: replace(record, has_statistics=measured, progress=replace(record.progress, stale=0), back_to=None),
            now,
            Origin(self.record.name, number, known.digest),
            event,
        )

    @property
    def has_test_set(self) -> bool:
        """Whether the coordinator measures versions itself."""
        return self._evaluators.coordinator

    async def measure(self) -> tuple[Metric, ...]:
        """Measure the newest version on the coordinator's test set, unless that was done, and keep the result."""
        if not self.has_test_set or self.current.test:
            return ()

        async def measured_there() -> tuple[Metric, ...]:
            return await self._code.measure(await self.checkpoints.fetch(self.version.number))

        measured = await patiently(self._troubles, EVALUATION, measured_there, (*STORES, TaskProcessGone))
        progress, current = self._judged("test", measured)
        await self._commit(lambda record: replace(record, progress=progress), Transition.VERSION_MEASURED, current)
        self.current = current
        return measured

    def _judged(self, on: str, metrics: tuple[Metric, ...]) -> tuple[objective.Progress, VersionRecord]:
        """The newest version with these measurements of it, and what they make of the progress."""
        progress = self.record.progress
        if not metrics:
            return progress, self.current
        current = replace(self.current, test=metrics) if on == "test" else replace(self.current, clients=metrics)
        if on == self._evaluators.judge:
            progress = objective.judge(self.settings.objective, progress, current.version.number, metrics)
        return progress, current

    async def _publish(
        self, make: Make, change: Callable[[RunRecord], RunRecord], now: datetime, parent: Origin, *others: Record
    ) -> None:
        """Make a version, made from `parent`, the newest, with `change` of the record and what else is to be known then."""
        number = self.record.latest + 1
        current = await self._with_forms(await self._write(make, number, now, parent), self.current)
        await self._commit(lambda record: replace(change(record), latest=number), Transition.VERSION_PUBLISHED, current, *others)
        self.current = current
        self._take(number, *self.checkpoints.here(number))
        best = self.record.progress.best
        wanted = {number} if best is None else {number, best}
        await patiently(self._troubles, ARTIFACTS, lambda: self.checkpoints.prune(wanted, number))

    async def _write(self, make: Make, number: int, now: datetime, parent: Origin | None) -> VersionRecord:
        """Write a version's files. Nobody knows of it yet, and until somebody does it can be written again."""
        draft = await patiently(self._troubles, ARTIFACTS, lambda: self.checkpoints.draft(number, make))
        version = await patiently(self._troubles, ARTIFACTS, lambda: self.checkpoints.publish(draft))
        return VersionRecord(self.record.name, version, self.checkpoints.location(number), now, parent=parent)

    async def _with_forms(self, record: VersionRecord, before: VersionRecord | None) -> VersionRecord:
        """A version with the other files in which it can be fetched, made now."""
        version = record.version
        if self._forms.download == "none":
            return record
        base = (before.version, self.checkpoints.path(before.version.number)) if before is not None else None
        forms = await offload(version.size_bytes, self._forms.make, version, self.checkpoints.path(version.number), base)
        return replace(record, version=replace(version, forms=forms))

    def _copy(self, weights: Path, state: Path, number: int) -> bytes:
        """Write what is loaded as version `number`."""
        if self._state is not None:
            self._state.copy(state)
        return self.model.write(weights, self._metadata(number))

    async def _commit(self, change: Callable[[RunRecord], RunRecord], at: Transition, *others: Record) -> None:
        """Store a change of the record, as it is at this moment, together with other records."""
        async with self._changing:
            record = change(self.record)
            await self._store.commit(*others, record, at=at)
            self.record = record
        self._point()

    def _point(self) -> None:
        """Let the names in the folder follow; the record says what is true."""
        self.checkpoints.point(LATEST, self.record.latest)
        if self.record.progress.best is not None:
            self.checkpoints.point(BEST, self.record.progress.best)

    async def _load(self, number: int) -> None:
        """Let version `number` be the model, with the optimizer's state behind it. Raises ConfigError: one of them is damaged."""
        self._take(number, await self.checkpoints.fetch(number), await self.checkpoints.state(number))

    def _take(self, number: int, weights: Path, state: Path | None) -> None:
        source = f"run {self.record.name}: the optimizer's state of version {number}"
        after = OptimizerState(state, self.model.manifest.size, source) if state is not None else None
        self.model.load(weights)  # only now, with both at hand: the model and the state belong together
        self._state = after

    def _metadata(self, number: int) -> dict[str, str]:
        """What a file says of its version: one key, for safetensors writes several in random order."""
        record = self.record
        origin = {"run": record.name, "task": record.task, "task_version": record.task_version, "version": number}
        return {"choral": json.dumps(origin)}


def _synced(path: Path) -> bytes:
    """Make a file's bytes stay; their SHA-256."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return digest_of_file(path)


class Runs:
    """Opens runs: the one that an earlier process left, or new ones."""

    def __init__(
        self,
        config: ServerConfig,
        code: TaskCode,
        store: Store,
        checkpoints: Callable[[str], Checkpoints],
        troubles: Troubles,
    ) -> None:
        self._config = config
        self._code = code
        self._store = store
        self._checkpoints = checkpoints
        self._troubles = troubles

    async def open(self, now: datetime) -> Run:
        """The newest run of the configured name, as an earlier process left it, or a new one.

        Raises ConfigError: it is of another task or model, or its newest version is missing or damaged.
        """
        name, last = self._newest()
        task, configured = self._code.blueprint, self._config.run
        if last is None:
            return await self._begin(RunRecord(name, task.task, task.version, configured.rounds, now))
        if (last.task, last.task_version) != (task.task, task.version):
            raise ConfigError(
                f"run {last.name} trains task {last.task} {last.task_version}, not {task.task} {task.version}: "
                "give run.name another value"
            )
        planned = configured.rounds if last.name == configured.name else last.rounds_planned
        if last.state not in OVER or (last.state is RunState.FINISHED and last.rounds_done < planned):
            last = replace(last, rounds_planned=planned, state=RunState.WAITING, reason="")
        run = self._make(last)
        await run.resume()
        await self._store.commit(last)
        return run

    async def further(self, now: datetime, rounds: int, parent: Run | None) -> Run:
        """A new run with the next free number behind its name: `rounds` (0: as configured), from the model of `parent` if given."""
        task = self._code.blueprint
        record = RunRecord(self._newest()[0], task.task, task.version, rounds or self._config.run.rounds, now)
        told = f"{record.rounds_planned} rounds"
        if parent is not None:
            told += f", from version {parent.record.latest} of {parent.record.name}"
            record = replace(record, has_statistics=parent.record.has_statistics)
        return await self._begin(record, parent, EventRecord(now, "run started", told, record.name))

    async def _begin(self, record: RunRecord, parent: Run | None = None, *others: Record) -> Run:
        run = self._make(record)
        if (newest := max(await run.checkpoints.numbers(), default=0)) > 0:  # a crash at the beginning may leave version 0
            raise ConfigError(
                f"run {record.name}: {run.checkpoints.location(newest)} is there, and the database knows no such run: "
                "restore a backup, give the database that belongs to these versions, or give run.name another value"
            )
        await run.begin(record.started_at, parent, *others)
        return run

    def _make(self, record: RunRecord) -> Run:
        checkpoints = self._checkpoints(record.name)
        return Run(self._config, self._code, self._store, checkpoints, self._troubles, record)

    def _newest(self) -> tuple[str, RunRecord | None]:
        """The first free name of base, base-2, base-3, …, and the run before it."""
        base, last = self._config.run.name, None
        for number in itertools.count(1):
            name = base if number == 1 else f"{base}-{number}"
            if name not in self._store.runs:
                return name, last
            last = self._store.runs[name]
        raise AssertionError("count never ends")
