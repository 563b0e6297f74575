"""Real processes for tests: a coordinator and clients as users start them, in a folder of their own."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeVar

import grpc
import yaml
from choral.address import HostPort
from choral.identity import Identity
from choral.token import Token
from choral.v1 import admin_pb2, admin_pb2_grpc
from choral_client.enrolment import enrol, tls
from choral_deploy.given import hand_over
from choral_server.caller import Role
from choral_server.config import ServerConfig, load
from choral_server.database import Database
from choral_server.history_key import key_for
from choral_server.lease import Lease
from choral_server.membership import Membership
from choral_server.store import Store
from choral_server.troubles import Troubles
from choral_server.trust import Authority, make_authority
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from e2e.zygote import Forked, Zygote

T = TypeVar("T")
PATIENCE_S = float(os.environ.get("CHORAL_PATIENCE_S", "90"))  # for a loaded machine; no test asserts how long anything took
CLI = ("-m", "choral_deploy.cli")
BOSTON = "choral.tasks.boston_housing:task"

SMALL_TASK = """
import torch
from choral import Table, Task, Training
from torch import nn
from torch.nn.functional import l1_loss, mse_loss


class Descent:  # torch.optim's would spend two seconds of each process on importing torch's compiler
    def __init__(self, parameters, learning_rate):
        self.parameters, self.learning_rate = list(parameters), learning_rate

    def zero_grad(self):
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self):
        for parameter in self.parameters:
            parameter -= self.learning_rate * parameter.grad


task = Task(
    name="small",
    model=lambda: nn.Linear(2, 1),
    loss=mse_loss,
    metrics={"mae": l1_loss},
    load=Table(["a", "b"], target="y"),
    training=Training(epochs=1, batch_size=2, learning_rate=0.01),
    optimizer=Descent,
)
"""
"""Three averaged numbers, y from a and b: rounds of it take no time."""

GATED_TASK = """
import json, os, sys, time
from dataclasses import replace
from pathlib import Path
import small


def loss(prediction, target):
    gate = os.environ.get("GATE")
    if gate and not Path(gate).exists():
        print(json.dumps({"event": "at the gate"}), file=sys.stderr, flush=True)
        while not Path(gate).exists():
            time.sleep(0.01)
    return small.task.loss(prediction, target)


task = replace(small.task, name="gated", loss=loss)
"""
"""A client with GATE in its environment logs "at the gate" in its first batch and waits there until that file exists."""


def until(condition: Callable[[], bool]) -> None:
    """Look until it is so: for what nobody tells."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


class Process:
    """One process. Its standard error and output are read as they come, and kept."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[object],
        folder: Path,
        environment: Mapping[str, object],
        zygote: Zygote | None = None,
    ) -> None:
        self.name = name
        words, surroundings = [str(part) for part in arguments], {key: str(value) for key, value in environment.items()}
        pipes = [os.pipe(), os.pipe()]
        (_, stdout), (_, stderr) = pipes
        self.popen: subprocess.Popen[bytes] | Forked
        if zygote is not None:
            self.popen = zygote.start(words, folder, surroundings, stdout, stderr)
        else:
            self.popen = subprocess.Popen(
                words,
                cwd=folder,
                env=os.environ | surroundings,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        self.err: list[str] = []
        self.out: list[str] = []
        self._news = threading.Condition()
        self._reading = 2
        for (reading, writing), lines in zip(pipes, (self.out, self.err), strict=True):
            os.close(writing)
            threading.Thread(target=self._read, args=(os.fdopen(reading), lines), daemon=True).start()

    @property
    def stderr(self) -> str:
        """All of it so far."""
        return "".join(self.err)

    @property
    def stdout(self) -> str:
        """All of it so far."""
        return "".join(self.out)

    @property
    def running(self) -> bool:
        """Whether it has its streams open."""
        return self._reading > 0

    def events(self, event: str, **fields: object) -> list[dict[str, Any]]:
        """The log entries so far that are called `event` and have these fields."""
        return [entry for entry in _entries(self.err) if entry.get("event") == event and fields.items() <= entry.items()]

    def saw(self, event: str, count: int = 1, **fields: object) -> dict[str, Any]:
        """Wait until it has logged `event` with these fields `count` times; returns the entry."""
        self._wait_until(lambda: len(self.events(event, **fields)) >= count, f"log {event!r} {fields or ''} {count} times")
        return self.events(event, **fields)[count - 1]

    def progress(self, lines: int) -> None:
        """Wait until it has logged so many more lines, or has ended."""
        with self._news:
            enough = len(self.err) + lines
            self._news.wait_for(lambda: len(self.err) >= enough or self._reading == 0, PATIENCE_S)

    def said(self, text: str) -> str:
        """Wait until a line of standard output or error holds `text`; returns it."""
        self._wait_until(lambda: any(text in line for line in (*self.out, *self.err)), f"say {text!r}")
        return next(line for line in (*self.out, *self.err) if text in line)

    def code(self) -> int:
        """Wait for its end; the exit code."""
        try:
            code = self.popen.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} did not end:\n{self.stderr}") from None
        with self._news:
            assert self._news.wait_for(lambda: self._reading == 0, PATIENCE_S), f"a child of {self.name} has kept its streams open"
        return code

    def terminate(self) -> None:
        """SIGTERM."""
        self.popen.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.popen.kill()
        self.code()

    def end(self) -> None:
        """Make sure that it has ended."""
        self.popen.kill()
        self.code()

    def _wait_until(self, condition: Any, what: str) -> None:
        with self._news:
            self._news.wait_for(lambda: condition() or self._reading == 0, PATIENCE_S)
            why = "ended before it did" if self._reading == 0 else "did not"
            assert condition(), f"{self.name} was to {what} and {why}:\n{self.stderr}{self.stdout}"

    def _read(self, stream: IO[str], lines: list[str]) -> None:
        with stream:
            for line in stream:
                with self._news:
                    lines.append(line)
                    self._news.notify_all()
        with self._news:
            self._reading -= 1
            self._news.notify_all()


class Federation:
    """A folder with an authority, a configuration and shards, and the processes that work there; all end with the context."""

    def __init__(self, folder: Path, hosts: Sequence[str] = ("localhost", "127.0.0.1"), zygote: Zygote | None = None) -> None:
        make_authority(folder, hosts)
        self._zygote = zygote
        self._identities: dict[str, Identity] = {}
        self._invited = set[str]()
        self.folder = folder
        self.config = folder / "choral.yaml"
        self.address = ""
        self.processes: list[Process] = []
        self.write_task(SMALL_TASK)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self.processes:
            process.end()
            sys.stdout.write(f"--- {process.name} ({process.popen.returncode})\n{process.stderr}{process.stdout}")

    @property
    def ca(self) -> Path:
        """The authority's certificate."""
        return self.folder / "ca.pem"

    @property
    def versions(self) -> Path:
        """Where the coordinator keeps the versions of its first run."""
        return self.folder / "state" / "runs" / "run" / "versions"

    @property
    def latest(self) -> bytes:
        """The checkpoint that the coordinator calls its latest."""
        return (self.versions / "latest.safetensors").read_bytes()

    def write_task(self, source: str, name: str = "small", folder: Path | None = None) -> str:
        """Write a module with a task into the folder that processes start in; returns the reference to its `task`."""
        ((folder or self.folder) / f"{name}.py").write_text(source)
        return f"{name}:task"

    def write_shard(self, client: str, rows: Iterable[Sequence[float]] = ((1, 2, 3), (2, 1, 3), (0, 1, 1), (1, 0, 1))) -> Path:
        """A shard for the small task, rows of a, b and y, in a folder of the client's own."""
        path = self.folder / client / "shard.csv"
        path.parent.mkdir(exist_ok=True)
        path.write_text("a,b,y\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))
        return path

    def configure(self, **changes: Any) -> None:
        """Write the configuration: a small run, with these changes; a value of None removes its key."""
        content: dict[str, Any] = {
            "listen": "127.0.0.1:0",
            "tls": {"certificate": "server.pem", "key": "server.key", "ca": "ca.pem", "ca_key": "ca.key"},
            "state": "state",
            "task": "small:task",
            "run": {"rounds": 3, "cohort_size": 2, "deadline_s": 600},
            "exit_when_done": True,
        }
        for key, value in changes.items():
            content[key] = content.get(key, {}) | value if isinstance(value, dict) else value
        self.config.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))

    def start(self, name: str, *arguments: object, launcher: Sequence[object] = CLI, **options: Any) -> Process:
        """Start a `choral` command; options: `before`, words in front of it, `folder` to start it in, and `environment`."""
        command = arguments if self._zygote else (*options.get("before", ()), sys.executable, *launcher, *arguments)
        folder, environment = options.get("folder") or self.folder, options.get("environment") or {}
        process = Process(name, command, folder, environment, self._zygote)
        self.processes.append(process)
        return process

    def start_coordinator(self, **options: Any) -> Process:
        """Start the coordinator with the configuration as it is."""
        return self.start("coordinator", "server", "-c", self.config, "--log-format", "json", **options)

    def coordinator(self, **changes: Any) -> Process:
        """Write the configuration with these changes, start the coordinator and wait until it is ready; learns its address."""
        self.configure(**changes)
        process = self.start_coordinator()
        self.address = process.saw("coordinator ready")["address"]
        return process

    def client(self, name: str, shard: Path | None = None, task: str = "small:task", **options: Any) -> Process:
        """Start a client, by default with a shard of its own and enrolled as a user would; option `flags`: further flags by name.

        A flag of value None is left out.
        """
        flags: dict[str, Any] = {
            "--name": name,
            "--server": self.address,
            "--task": task,
            "--data": shard or self.write_shard(name),
            "--state": self.folder / name / "client",
            "--holdout": 0,
            "--threads": 1,
            "--log-format": "json",
        } | options.pop("flags", {})
        if not flags.keys() & {"--token", "--ca", "--plaintext"} and not (Path(flags["--state"]) / "identity").exists():
            if name in self._invited:
                flags["--token"] = self.folder / f"{name}.token"
            elif any(process.name == "coordinator" and process.running for process in self.processes):
                flags["--token"] = self.token_file(name)
            else:
                self.vouch(name, Path(flags["--state"]))
        flags = {flag: value for flag, value in flags.items() if value is not None}
        return self.start(name, "client", *(part for flag in flags.items() for part in flag), **options)

    def token(self, name: str, role: str = "device", **fields: Any) -> str:
        """A new token, which may take the place of a member of that name."""
        with self.admin() as admin:
            asked = admin_pb2.IssueTokenRequest(**{"name": name, "role": role, "replace": True} | fields)
            return admin.IssueToken(asked, timeout=PATIENCE_S, wait_for_ready=True).token

    def token_file(self, name: str) -> Path:
        """A file with a new token."""
        path = self.folder / f"{name}.token"
        hand_over(path, self.token(name))
        return path

    def invite(self, *names: str) -> None:
        """Make tokens before the first coordinator starts, which then finds them in its database."""
        for name, token in run_apart(_issued(load(self.config), names)).items():
            hand_over(self.folder / f"{name}.token", token)
            self._invited.add(name)

    def forget(self) -> None:
        """Nobody is a member any more: identities of members, and of clients, go."""
        self._identities.clear()
        for folder in self.folder.glob("*/client/identity"):
            shutil.rmtree(folder)

    def vouch(self, name: str, state: Path) -> None:
        """An identity as if `name` had enrolled earlier, while no coordinator runs; that of now does not know it."""
        key = ec.generate_private_key(ec.SECP256R1())
        authority = Authority.load(self.ca, self.folder / "ca.key")
        made = authority.certify(key.public_key(), name, "device", 3600.0, datetime.now(UTC))
        folder = state / "identity"
        folder.mkdir(parents=True)
        (folder / "about.json").write_text(json.dumps({"name": name, "role": "device", "server": self.address}))
        (folder / "ca.pem").write_bytes(self.ca.read_bytes())
        (folder / "tls.pem").write_bytes(made.public_bytes(Encoding.PEM))
        (folder / "tls.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))

    def identity(self, name: str, role: str = "device") -> Identity:
        """The identity of a member that is no process of its own; made when it is asked for the first time."""
        if name not in self._identities:
            made = Token.parse(self.token(name, role))
            self._identities[name] = run_apart(enrol(made, HostPort.parse(self.address), self.folder / "members" / name))
        return self._identities[name]

    @property
    def enrolment_port(self) -> int:
        """Where tokens are turned into certificates."""
        return Token.parse(self.token("nobody")).port

    def command(self, *arguments: object) -> Process:
        """Run a `choral` command to its end."""
        process = self.start(" ".join(map(str, arguments)), *arguments)
        process.code()
        return process

    def rows(self, *arguments: object) -> list[dict[str, Any]]:
        """What a listing of the operators' commands says, with --json."""
        listing = self.command(*arguments, "-c", self.config, "--json")
        assert listing.code() == 0, listing.stderr
        found: list[dict[str, Any]] = json.loads(listing.stdout)
        return found

    @contextmanager
    def admin(self) -> Iterator[admin_pb2_grpc.AdminStub]:
        """The operators' service."""
        with grpc.insecure_channel(f"unix:{self.folder / 'state' / 'admin.sock'}") as channel:
            yield admin_pb2_grpc.AdminStub(channel)

    def watch(self) -> Iterator[admin_pb2.WatchResponse]:
        """Every change from now on, after a snapshot."""
        with self.admin() as admin:
            yield from admin.Watch(admin_pb2.WatchRequest(), timeout=PATIENCE_S)

    def secure_channel(self, name: str = "somebody", role: str = "device") -> grpc.Channel:
        """A channel to the members' port, of the member of that name."""
        return grpc.secure_channel(self.address, tls(self.identity(name, role).credentials))


async def _issued(config: ServerConfig, names: Iterable[str]) -> dict[str, str]:
    assert config.tls is not None
    assert config.tls.ca_key is not None
    assert config.enrolment_address is not None
    config.state.mkdir(exist_ok=True)
    database = await Database.open(config.database_url, Troubles())
    try:
        lease = await Lease.take(database, "an operator", 30.0)
        store = await Store.open(database, lease, await key_for(config.state, database))
        authority = Authority.load(config.tls.ca, config.tls.ca_key)
        membership = Membership(store, authority, 3600.0, lambda: datetime.now(UTC))
        membership.enrolment_port = config.enrolment_address.port
        issued = {name: str((await membership.issue(name, Role.DEVICE, 3600.0, replacing=True))[0]) for name in names}
        await lease.give_up()
        return issued
    finally:
        await database.close()


def run_apart(doing: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, also for who is called from another."""
    with ThreadPoolExecutor(1) as apart:
        return apart.submit(asyncio.run, doing).result()


def _entries(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.startswith("{"):
            yield json.loads(line)
