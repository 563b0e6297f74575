"""The coordinator's process: build everything, serve, drain."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import structlog
from choral.address import HostPort
from choral.codecs import MASKED
from choral.durable import write_durably
from choral.errors import ConfigError, Revoked
from choral.metrics import LOSS

from choral_server import failpoints, open_files
from choral_server.admin import AdminService
from choral_server.artifacts import Artifacts, open_artifacts
from choral_server.blueprint import Blueprint
from choral_server.checkpoints import Checkpoints
from choral_server.collection import House
from choral_server.config import Enrolment, ServerConfig
from choral_server.coordinator import Coordinator
from choral_server.database import Database
from choral_server.doors import Doors
from choral_server.facts import configuration
from choral_server.history_key import key_for
from choral_server.lease import Lease
from choral_server.membership import Membership, Roles
from choral_server.privacy_check import check_past, check_privacy, check_ranges
from choral_server.records import RunRecord, RunState
from choral_server.run import Runs
from choral_server.secure_aggregation import FEW
from choral_server.service import FederationService
from choral_server.sessions import Sessions
from choral_server.spool import Spool
from choral_server.state_folder import locked
from choral_server.store import Store
from choral_server.task_code import HostedTask
from choral_server.task_process import TaskProcess
from choral_server.transfers import Transfers
from choral_server.troubles import Troubles
from choral_server.trust import Authority

log = structlog.get_logger()
_LINGER_S = 0.3  # a reader that still acknowledges what it reads would lose the rest of it to a closed socket


async def serve(
    config: ServerConfig,
    ready: Callable[[HostPort], None] = lambda address: None,
    process: TaskProcess | None = None,
) -> int:
    """Run the coordinator until SIGTERM or, if configured, until the run is over. Returns the exit code.

    `ready` is called with the address in use once clients can come. `process` is where the task's code is to run; whoever starts it
    before importing this module has it ready earlier. Raises ConfigError, TaskError, DataError, AddressError, TrustError, or
    LeaseLost: another coordinator has taken over.
    """
    code = HostedTask(process or TaskProcess(), config.task, config.run.seed, config.evaluation.test_set)
    try:
        return await _serve(config, code, ready)
    finally:
        await code.end()


async def _serve(config: ServerConfig, code: HostedTask, ready: Callable[[HostPort], None]) -> int:
    failpoints.check()
    open_files.allow(config.limits.connections)
    opening = asyncio.create_task(code.open())  # meanwhile the database is opened
    try:
        troubles = Troubles()
        with locked(config.state):
            artifacts = await open_artifacts(config.artifacts, config.state)
            async with _stored(config, troubles, opening) as (store, lease):
                _check_objective(config.run.objective.metric, code.blueprint)
                if config.run.privacy is not None:
                    check_privacy(config.run.privacy, config.run, code.blueprint)
                    check_past(await store.unprotected())
                elif store.spendings:
                    log.warning("rounds get no noise any more", spent_before=len(store.spendings))
                if config.run.example_privacy is not None:
                    check_ranges(code.blueprint)
                runs = Runs(config, code, store, _checkpoints(config, artifacts), troubles)
                last = await _work(config, runs, code, store, lease, troubles, ready)
    finally:
        opening.cancel()
        with suppress(asyncio.CancelledError, Exception):  # what it raised has been raised, or something else has
            await opening
    log.info("coordinator ends", run=last.name, state=last.state.value)
    return 1 if last.state is RunState.FAILED else 0


async def _work(
    config: ServerConfig,
    runs: Runs,
    code: HostedTask,
    store: Store,
    lease: Lease,
    troubles: Troubles,
    ready: Callable[[HostPort], None],
) -> RunRecord:
    """Serve clients and operators, and conduct runs until it is enough; the last of them."""
    run = await runs.open(now())
    code.rest()
    task = code.blueprint
    needs = {MASKED} if config.run.secure_aggregation is not None else set()
    sessions = Sessions(task.task, task.version, task.manifest, needs)
    membership = _membership(config, store)
    transfers = Transfers(config.limits.transfer_bytes)
    house = House(store, sessions, transfers, troubles, config.spool_bytes, now)
    spool = Spool(config.state / "spool", troubles)
    coordinator = Coordinator(
        run,
        house,
        spool,
        config.state,
        config.heartbeat_s,
        lambda rounds, parent: runs.further(house.clock(), rounds, parent),
        config.limits,
    )
    federation = FederationService(coordinator, sessions, transfers, config.limits)
    doors = Doors(config, membership, federation, AdminService(coordinator, store, membership))
    membership.expelled = lambda name, reason: _expel(doors, coordinator, name, reason)
    membership.replaced = lambda name, reason: doors.end_calls(name, Revoked(reason))
    address = await doors.open()
    conducting = asyncio.create_task(_conduct(coordinator, config))
    _drain_on_signals(coordinator, conducting, config.drain_s)
    if (secure := config.run.secure_aggregation) is not None and secure.minimum_cohort < FEW:
        log.warning("a sum of few tells much of each", minimum_cohort=secure.minimum_cohort, better=FEW)
    log.info("coordinator ready", address=str(address), run=run.record.name, task=task.task, tls=config.tls is not None)
    ready(address)
    try:
        await _until_over(coordinator, conducting, lease)
    finally:
        await coordinator.dismiss(config.drain_s)
        if store.end_watches():
            await asyncio.sleep(_LINGER_S)
        await doors.close()
    return coordinator.run.record


def _membership(config: ServerConfig, store: Store) -> Membership:
    """Who belongs. Raises TrustError: a file of the authority cannot be used."""
    tls, enrolment = config.tls, config.enrolment or Enrolment()
    if tls is None:
        return Membership(store, None, enrolment.certificate_s, now, certified=False)
    authority = Authority.load(tls.ca, tls.ca_key) if tls.ca_key is not None else None
    if authority is not None and authority.renew_server(tls.certificate, tls.key, now()):
        log.info("the server's certificate was about to expire and has been renewed", file=str(tls.certificate))
    return Membership(store, authority, enrolment.certificate_s, now, Roles(frozenset(tls.operators), frozenset(tls.viewers)))


def _expel(doors: Doors, coordinator: Coordinator, name: str, reason: str) -> None:
    doors.end_calls(name, Revoked(reason))
    coordinator.attendance.expel(name, reason)


def now() -> datetime:
    """The time."""
    return datetime.now(UTC)


async def _until_over(coordinator: Coordinator, conducting: asyncio.Task[None], lease: Lease) -> None:
    """Conduct runs until it is enough, or the lease is lost."""
    holding = asyncio.create_task(lease.renew_forever())
    try:
        await asyncio.wait({conducting, holding}, return_when=asyncio.FIRST_COMPLETED)
        if holding.done():
            holding.result()  # raises LeaseLost
        if conducting.cancelled():
            log.info("round left to the next start", run=coordinator.run.record.name)
        else:
            conducting.result()
    finally:
        for task in (conducting, holding):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


def _drain_on_signals(coordinator: Coordinator, conducting: asyncio.Task[None], drain_s: float) -> None:
    """Told to end, let the round under way end; leave one that takes longer than `drain_s` to the next start."""
    loop = asyncio.get_running_loop()

    def drain() -> None:
        patience_s = 0.0 if coordinator.draining else drain_s  # asked a second time, at once
        log.info("draining", seconds=patience_s)
        coordinator.drain()
        loop.call_later(patience_s, conducting.cancel)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, drain)


async def _conduct(coordinator: Coordinator, config: ServerConfig) -> None:
    while not coordinator.draining:
        await coordinator.conduct()
        if config.exit_when_done and not coordinator.draining:
            await coordinator.await_return(config.drain_s)
            return
        await coordinator.rest()


@asynccontextmanager
async def _stored(config: ServerConfig, troubles: Troubles, task_open: Awaitable[None]) -> AsyncIterator[tuple[Store, Lease]]:
    """The database, which no other coordinator may use meanwhile, and what is in it; with a task that can be used."""
    database = await Database.open(config.database_url, troubles)
    try:
        lease = await Lease.take(database, _holder(config.state), config.lease_s)
        async with _given_up(lease, config.drain_s):
            store = await Store.open(database, lease, await key_for(config.state, database))
            await task_open
            await store.configure(configuration(config, database.name))
            async with _flushed(store, config.drain_s):
                yield store, lease
    finally:
        await database.close()


@asynccontextmanager
async def _given_up(lease: Lease, patience_s: float) -> AsyncIterator[None]:
    """Let others have the lease at the end, also if it comes at once; a database that is gone keeps nobody from ending."""
    try:
        yield
    finally:
        with suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await lease.give_up()


@asynccontextmanager
async def _flushed(store: Store, patience_s: float) -> AsyncIterator[None]:
    try:
        yield
    finally:
        with suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await store.flush()


def _holder(folder: Path) -> str:
    """The name under which this state folder holds the database: one that starts again has the same, one in a copy has not."""
    path = folder / "holder"
    if not path.exists():
        write_durably(path, f"{os.uname().nodename}-{secrets.token_hex(4)}".encode())
    return f"{path.read_text(encoding='utf-8')}-{path.stat().st_ino:x}"


def _checkpoints(config: ServerConfig, artifacts: Artifacts) -> Callable[[str], Checkpoints]:
    return lambda run: Checkpoints(artifacts, config.state, run, config.run.keep_versions)


def _check_objective(metric: str, task: Blueprint) -> None:
    known = (LOSS, *task.metrics)
    if metric not in known:
        raise ConfigError(f"run.objective.metric: {metric!r} is not measured by task {task.task}; it has {', '.join(known)}")
