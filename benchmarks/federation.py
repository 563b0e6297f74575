"""What the benchmarks share: a federation of real processes, started as users start them, over TLS on loopback.

With it the tests' own tools can be imported: the bad link (`proxy`) and the PostgreSQL server (`server.databases`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import yaml
from choral.address import HostPort
from choral.errors import ChoralError, Unreachable
from choral.plan import Kind
from choral.token import Token
from choral.v1 import admin_pb2 as pb
from choral.voucher import Voucher
from choral.wire import KINDS
from choral_client.enrolment import enrol, tls
from choral_client.signing_key import SigningKey
from choral_deploy.given import hand_over
from choral_deploy.operator import Operator
from choral_deploy.processes import Child, Children, started
from choral_server.trust import CA_CERTIFICATE, CA_KEY, Authority, make_authority
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from usage import usage

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "tests"))  # not installed: like the benchmarks, they are for those who work on Choral

Times = np.ndarray[tuple[int], np.dtype[np.float64]]
ENDLESS = 1_000_000  # rounds
OWN_AUTHORITY = {"certificate": "server.pem", "key": "server.key", "ca": "ca.pem"}
"""of a coordinator that enrols nobody: `certify` makes the clients' certificates"""
_CLI = "choral_deploy.cli"
_CERTIFICATE_S = 86_400.0
_POLL_S = 0.05
_QUIET, _QUIET_S = 0.02, 0.3  # so much CPU time in so long is nobody's work
_TRAINING = KINDS[Kind.TRAINING]
_INTERRUPTED = 130  # the exit code after Ctrl-C


class Federation:
    """A coordinator and its clients, in a folder. All hold the same shard. `rounds` has told of `rounds_told`.

    Clients enrol with a token that they are given, unless there are certificates for them in the folder (`certify`).
    """

    def __init__(self, folder: Path, task: str, children: Children, processes: asyncio.TaskGroup) -> None:
        self.clients: list[Child] = []
        self.address = ""
        self.operator = Operator(str(folder / "state" / "admin.sock"))
        self.folder = folder
        self.rounds_told = 0
        self._task = task
        self._children = children
        self._processes = processes

    async def start_coordinator(self) -> None:
        """Start it and wait until it is ready."""
        ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def listen(line: str) -> None:
            if not ready.done() and '"coordinator ready"' in line:
                ready.set_result(json.loads(line)["address"])

        arguments = ["server", "--config", self.folder / "choral.yaml", "--log-format", "json"]
        coordinator = await self._start("coordinator", arguments, listen)
        self._server = coordinator
        self._coordinator = self._processes.create_task(_succeed(coordinator))
        self.address = await ready

    async def start_clients(
        self, count: int, address: str = "", data: Sequence[Path] = (), software: Sequence[str] = (_CLI,)
    ) -> None:
        """Start so many more; they reach the coordinator at its own address, if no other is given.

        `data` are shards of their own, by number; without, they share one. `software` is the module that they run, if it is not the
        ordinary one, and what comes before the ordinary arguments.
        """
        for number in range(len(self.clients), len(self.clients) + count):
            name = _client(number)
            options = {
                "--name": name,
                "--server": address or self.address,
                "--task": self._task,
                "--data": data[number] if data else self.folder / "shard.csv",
                "--state": self.folder / name,
                "--holdout": 0,
                "--threads": 1,
                "--log-level": "warning",
            }
            if (certificate := self.folder / f"{name}.pem").exists():
                options |= {"--ca": self.folder / CA_CERTIFICATE, "--certificate": certificate}
                options |= {"--key": certificate.with_suffix(".key")}
            else:
                options["--token"] = self.folder / f"{name}.token"
                hand_over(self.folder / f"{name}.token", await self.operator.token(name))
            arguments = ["client", *(part for option in options.items() for part in option)]
            client = await self._start(name, arguments, software=software)
            self._processes.create_task(_succeed(client))
            self.clients.append(client)

    async def start_light(self, first: int, count: int) -> None:
        """Start one process that is so many clients (light.py), for whom there are certificates."""
        log = self.folder / f"light-{first}.log"
        arguments = ["light", self.address, str(self.folder), str(first), str(count), self._task]
        process = await self._children.start(log.stem, arguments, log)
        self._processes.create_task(_succeed(process))
        self.clients.append(process)

    async def changes(self) -> AsyncGenerator[pb.Round, None]:
        """Each change of a training round, until the coordinator ends. Raises ChoralError: a round was abandoned."""
        try:
            async with self.operator.stub() as admin:
                async for change in admin.Watch(pb.WatchRequest()):
                    if change.WhichOneof("change") != "round" or change.round.kind != _TRAINING:
                        continue
                    if change.round.state == pb.ROUND_STATE_ABANDONED:
                        raise ChoralError(f"round {change.round.number} was abandoned: {change.round.reason}")
                    yield change.round
        except Unreachable:
            await self._coordinator  # knows better why
            raise
        await self._coordinator

    async def rounds(self) -> AsyncGenerator[pb.Round, None]:
        """Each training round once it is done, until the coordinator ends."""
        async with aclosing(self.changes()) as changes:
            async for changed in changes:
                if changed.state == pb.ROUND_STATE_DONE:
                    self.rounds_told = changed.number + 1
                    yield changed

    async def rest(self, rounds: AsyncIterator[pb.Round]) -> list[pb.Round]:
        """Pause the run and wait until nothing moves any more; returns the rounds that ended meanwhile."""
        ended = []
        async with self.operator.stub() as admin:
            state = (await admin.PauseRun(pb.PauseRunRequest())).run.state
            while state != pb.RUN_STATE_PAUSED:  # a little after the last round
                await asyncio.sleep(_POLL_S)
                state = (await admin.ListRuns(pb.ListRunsRequest())).runs[0].state
            (newest,) = (await admin.ListRounds(pb.ListRoundsRequest(limit=1))).rounds
        while self.rounds_told <= newest.number:
            ended.append(await anext(rounds))
        before, now = -math.inf, self.cpu_s()
        while now - before > _QUIET:  # clients still fetch the last version
            await asyncio.sleep(_QUIET_S)
            before, now = now, self.cpu_s()
        return ended

    async def resume(self) -> None:
        """Let the run go on."""
        async with self.operator.stub() as admin:
            await admin.ResumeRun(pb.ResumeRunRequest())

    async def stop(self) -> None:
        """End a run that rests."""
        async with self.operator.stub() as admin:
            await admin.StopRun(pb.StopRunRequest())

    @property
    def server_pid(self) -> int:
        """The coordinator's process."""
        return self._server.process.pid

    @property
    def client_pids(self) -> list[int]:
        """The clients' processes."""
        return [client.process.pid for client in self.clients]

    def cpu_s(self) -> float:
        """The CPU time of all processes so far."""
        return sum(usage(pid).cpu_s for pid in (self.server_pid, *self.client_pids))

    def memory_mb(self) -> float:
        """The coordinator's resident memory."""
        return usage(self.server_pid).resident_bytes / 2**20

    def server_cpu_s(self) -> float:
        """The CPU time that the coordinator has taken so far."""
        return usage(self.server_pid).cpu_s

    async def bare_call_s(self, calls: int = 300) -> float:
        """Median seconds of a unary call over TLS to the coordinator: while it waits, this is what this machine can do."""
        token = Token.parse(await self.operator.token("bare-caller"))
        known = await enrol(token, HostPort.parse(self.address), self.folder / "bare-caller")
        credentials = tls(known.credentials)
        async with grpc.aio.secure_channel(self.address, credentials) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]
            taken = []
            for _ in range(calls):
                began = time.perf_counter()
                await check(health_pb2.HealthCheckRequest())
                taken.append(time.perf_counter() - began)
        return float(np.median(taken))

    async def _start(
        self,
        name: str,
        arguments: list[object],
        listen: Callable[[str], None] | None = None,
        software: Sequence[str] = (_CLI,),
    ) -> Child:
        return await self._children.start(name, [*software, *map(str, arguments)], self.folder / f"{name}.log", listen)


@asynccontextmanager
async def federation(task: str, run: Mapping[str, Any], rows: int = 2, **config: Any) -> AsyncIterator[Federation]:
    """A coordinator that is ready for clients. Leaving the context waits for all processes, whose run must come to its end.

    `run` and `config` are keys of the coordinator's configuration, `rows` is the length of the shard. Raises ChoralError: a process
    failed.
    """
    async with unstarted(task, run, rows, **config) as made:
        await made.start_coordinator()
        yield made


@asynccontextmanager
async def unstarted(task: str, run: Mapping[str, Any], rows: int = 2, **config: Any) -> AsyncIterator[Federation]:
    """The same before its coordinator is started."""
    with tempfile.TemporaryDirectory(prefix="choral-") as name:
        _prepare(Path(name), task, run, rows, config)
        try:
            async with started() as children, asyncio.TaskGroup() as processes:
                yield Federation(Path(name), task, children, processes)
        except* ChoralError as failures:
            raise failures.exceptions[0] from None


def certify(folder: Path, count: int) -> None:
    """Make so many clients' keys and certificates, as an authority of one's own does if the coordinator enrols nobody.

    Their signing keys are certified too, or they would take part in no secure sum.
    """
    authority = Authority.load(folder / CA_CERTIFICATE, folder / CA_KEY)
    for name in map(_client, range(count)):
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = authority.certify(key.public_key(), name, "device", _CERTIFICATE_S, datetime.now(UTC))
        (folder / f"{name}.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        (folder / f"{name}.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
        signing = SigningKey.of(folder / name)
        signing.keep(Voucher(name, signing.public, authority.vouch(name, signing.public)))


async def launch_s(task: str, run: Mapping[str, Any], clients: int, **config: Any) -> float:
    """Seconds from the launch of all processes at once until the first round is done, of a run that would go on for long.

    What happens once in a federation's life has happened: there are certificates. No client has a model yet.
    """
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    async with unstarted(task, run, listen=address, tls=OWN_AUTHORITY, **config) as here:
        certify(here.folder, clients)
        began = time.time()
        async with asyncio.TaskGroup() as starting:
            starting.create_task(here.start_coordinator())
            starting.create_task(here.start_clients(clients, address))
        async with aclosing(here.rounds()) as rounds, here.operator.stub() as admin:
            await anext(rounds)
            (first,) = (await admin.ListRounds(pb.ListRoundsRequest(number=0))).rounds
            await here.rest(rounds)
            await here.stop()
            async for _ in rounds:
                pass
    return first.opened_at.ToNanoseconds() / 1e9 + first.duration_s - began


def timings(series: Iterable[Sequence[pb.Round]]) -> tuple[Times, Times]:
    """How long rounds took, and how long the cycles from one opening to the next, in ms; in a series they followed each other."""
    found = list(series)
    rounds = [done.duration_s for each in found for done in each]
    cycles = [np.diff([done.opened_at.ToNanoseconds() / 1e9 for done in each]) for each in found]
    return np.array(rounds) * 1000, np.concatenate(cycles) * 1000


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar of `total` steps on standard error, if that is a terminal; what it gives takes one step."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def tidily(main: Callable[[], None]) -> None:
    """Run a benchmark. What has a name ends in one line; Ctrl-C and SIGTERM end the benchmark's processes first."""
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])  # of the tasks
    try:
        main()
    except (ChoralError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


def at_least(least: int) -> Callable[[str], int]:
    """What reads such a number from the command line."""

    def read(word: str) -> int:
        if not word.isdecimal() or int(word) < least:
            raise argparse.ArgumentTypeError(f"{word!r} is no number from {least} on")
        return int(word)

    return read


def _prepare(folder: Path, task: str, run: Mapping[str, Any], rows: int, config: Mapping[str, Any]) -> None:
    """Certificates, a configuration, and a shard."""
    make_authority(folder, ["localhost", "127.0.0.1"])
    (folder / "shard.csv").write_text("x,y\n" + "1.0,0.0\n" * rows)
    content = {
        "listen": "127.0.0.1:0",
        "tls": {"certificate": "server.pem", "key": "server.key", "ca": "ca.pem", "ca_key": "ca.key"},
        "state": "state",
        "task": task,
        "run": {"keep_versions": 2, **run},
        "evaluation": {"clients": False},
        "exit_when_done": True,
    }
    (folder / "choral.yaml").write_text(yaml.safe_dump({**content, **config}))


def _client(number: int) -> str:
    return f"client-{number}"


async def _succeed(child: Child) -> None:
    """Wait for its end. Raises ChoralError with what it logged last: the log itself goes with its folder."""
    try:
        await child.succeed()
    except ChoralError:
        said = child.log.read_text(encoding="utf-8", errors="replace").splitlines() or ["it logged nothing"]
        raise ChoralError(f"{child.name} failed: {said[-1]}") from None
