"""The coordinator's process: build everything, serve, drain."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import grpc
import structlog
from choral.address import HostPort
from choral.errors import AddressError, ConfigError, TrustError
from choral.metrics import LOSS
from choral.task import Task, load_task
from choral.v1 import admin_pb2, admin_pb2_grpc, federation_pb2, federation_pb2_grpc
from choral.wire import MESSAGE_BYTES
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from choral_server.admin import AdminService
from choral_server.config import ServerConfig, Tls
from choral_server.coordinator import Coordinator
from choral_server.intake import Spool
from choral_server.run import further_run, open_run
from choral_server.service import FederationService
from choral_server.sessions import Sessions
from choral_server.store import RunState, Store

log = structlog.get_logger()
FEDERATION = federation_pb2.DESCRIPTOR.services_by_name["Federation"].full_name
ADMIN = admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name
_OPTIONS = [
    ("grpc.so_reuseport", 0),  # or a second coordinator would share the port in silence
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
]


async def serve(config: ServerConfig, ready: Callable[[HostPort], None] = lambda address: None) -> int:
    """Run the coordinator until SIGTERM or, if configured, until the run is over. Returns the exit code.

    `ready` is called with the address in use once clients can come. Raises ConfigError, TaskError, DataError, AddressError or
    TrustError.
    """
    task = load_task(config.task)
    test_set = task.examples(config.evaluation.test_set) if config.evaluation.test_set is not None else None
    _check_objective(config.run.objective.metric, task)
    store = _store(config.state)
    run = open_run(config, task, test_set, store, datetime.now(UTC))
    sessions = Sessions(task.name, task.version, run.model.manifest)
    further = partial(further_run, config, task, test_set, store)
    coordinator = Coordinator(
        run, sessions, store, config.heartbeat_s, lambda rounds, parent: further(datetime.now(UTC), rounds, parent)
    )
    federation = FederationService(coordinator, sessions, Spool(config.state / "spool"), config.heartbeat_s)

    server, address = await _listen(config, federation)
    operators = await _listen_to_operators(config.admin_socket, AdminService(coordinator, store))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _drain, coordinator, config.drain_s)
    log.info("coordinator ready", address=str(address), run=run.record.name, task=task.name, tls=config.tls is not None)
    ready(address)
    try:
        await _conduct(coordinator, config.exit_when_done)
    finally:
        await coordinator.dismiss(config.drain_s)
        store.end_watches()
        await asyncio.gather(server.stop(1.0), operators.stop(1.0))
        config.admin_socket.unlink(missing_ok=True)
    log.info("coordinator ends", run=coordinator.run.record.name, state=coordinator.run.record.state.value)
    return 1 if coordinator.run.record.state is RunState.FAILED else 0


async def _conduct(coordinator: Coordinator, exit_when_done: bool) -> None:
    while not coordinator.draining:
        await coordinator.conduct()
        if exit_when_done:
            return
        await coordinator.rest()


def _drain(coordinator: Coordinator, drain_s: float) -> None:
    """Let the round under way end; asked a second time, abandon it at once."""
    patience_s = 0.0 if coordinator.draining else drain_s
    log.info("draining", seconds=patience_s)
    coordinator.drain(patience_s)


def _check_objective(metric: str, task: Task) -> None:
    known = (LOSS, *task.metrics)
    if metric not in known:
        raise ConfigError(f"run.objective.metric: {metric!r} is not measured by task {task.name}; it has {', '.join(known)}")


def _store(folder: Path) -> Store:
    """The store in the state folder, which no other coordinator may use: the lock lasts as long as this process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"state: {folder} is in use by another coordinator: stop it, or give another folder") from error
    except OSError as error:
        raise ConfigError(f"state: {folder} cannot be used ({error.strerror}): give a folder that this user may write") from error
    return Store(folder)


async def _listen(config: ServerConfig, federation: FederationService) -> tuple[grpc.aio.Server, HostPort]:
    server = grpc.aio.server(options=_OPTIONS)
    federation_pb2_grpc.add_FederationServicer_to_server(federation, server)
    await _add_health_and_reflection(server, FEDERATION)
    try:
        if config.tls is not None:
            port = server.add_secure_port(str(config.listen), _credentials(config.tls))
        else:
            port = server.add_insecure_port(str(config.listen))
    except RuntimeError as error:
        raise AddressError(
            f"listen: {config.listen} cannot be used: another process has the port, or the address is not this machine's; "
            "stop that process or give another address"
        ) from error
    await server.start()
    return server, HostPort(config.listen.host, port)


async def _listen_to_operators(socket: Path, admin: AdminService) -> grpc.aio.Server:
    server = grpc.aio.server()
    admin_pb2_grpc.add_AdminServicer_to_server(admin, server)
    await _add_health_and_reflection(server, ADMIN)
    socket.parent.chmod(0o700)  # whoever can open the socket is an operator
    socket.unlink(missing_ok=True)
    try:
        server.add_insecure_port(f"unix:{socket}")
    except RuntimeError as error:
        raise AddressError(f"state: {socket} cannot be listened on; use a folder with a path of less than 90 characters") from error
    await server.start()
    return server


async def _add_health_and_reflection(server: grpc.aio.Server, service: str) -> None:
    healthy = health.aio.HealthServicer()
    for name in ("", service):
        await healthy.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    reflection.enable_server_reflection((service, health.SERVICE_NAME, reflection.SERVICE_NAME), server)


def _credentials(tls: Tls) -> grpc.ServerCredentials:
    def content(path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise TrustError(f"tls: {path} cannot be read ({error.strerror}): `choral server init` makes it") from error

    return grpc.ssl_server_credentials([(content(tls.key), content(tls.certificate))])
