"""A coordinator and a client without a network between them: the calls of the contract are made with messages that were decoded."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import grpc
from choral.config import parse
from choral.messages import Hello
from choral.plan import Kind
from choral.standardize import Standardize
from choral.table import Table
from choral.task import Task
from choral.wire import PROTOCOL_VERSION
from choral_client.transport import GrpcTransport
from choral_server import access
from choral_server.artifacts import FolderArtifacts
from choral_server.caller import CALLER, Caller, Role
from choral_server.checkpoints import Checkpoints
from choral_server.collection import Collection, House, assignment_id
from choral_server.config import Limits, ServerConfig
from choral_server.coordinator import Coordinator
from choral_server.database import Database
from choral_server.lease import Lease
from choral_server.rounds import Part, PartState, Round
from choral_server.run import Run, Runs
from choral_server.service import FederationService
from choral_server.sessions import Sessions
from choral_server.spool import Spool
from choral_server.store import Store
from choral_server.transfers import Transfers
from choral_server.troubles import Troubles
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import load_file
from server.home import Here
from torch import nn
from torch.nn.functional import mse_loss

NOON = datetime(2025, 6, 1, 12, tzinfo=UTC)
CLIENT = "alice"
SIGNS = Ed25519PrivateKey.from_private_bytes(bytes(32))
"""signs the history"""


def model() -> nn.Module:
    """Two features to standardise, three numbers to average, a counter."""
    return nn.Sequential(Standardize(2), nn.Linear(2, 1), nn.BatchNorm1d(1, affine=False))


TASK = Task("small", model, mse_loss, Table(["a", "b"], target="y"), metrics={"mse": mse_loss})
CONFIG = {
    "listen": "127.0.0.1:0",
    "plaintext": True,
    "state": "unused",
    "task": "tests:small",
    "run": {"rounds": 3, "cohort_size": 2, "quorum": 1, "quarantine_after": None, "max_update_norm": 100.0, "max_abandoned": 10},
}


class Aborted(Exception):
    """The servicer ended the call with a status, as gRPC would."""


class Call:
    """What gRPC hands to a servicer."""

    def peer(self) -> str:
        return "ipv4:192.0.2.1:40000"

    async def write(self, _message: object) -> None:
        pass

    async def send_initial_metadata(self, _metadata: object) -> None:
        pass

    async def abort(self, _code: grpc.StatusCode, details: str, _trailing: object = ()) -> NoReturn:
        raise Aborted(details)


class Floor:
    """A coordinator with its database in memory, and everything else in `folder`; for one round at a time."""

    def __init__(self, run: Run, house: House, folder: Path) -> None:
        self.run = run
        self.house = house
        self.folder = folder
        self.spool = Spool(folder / "spool", house.troubles)
        self.coordinator = Coordinator(run, house, self.spool, folder, 15.0, _no_other_run)
        self.service = FederationService(self.coordinator, house.sessions, house.transfers, Limits())
        self.coordinator.attendance.settled = True

    @classmethod
    async def open(cls, folder: Path) -> Floor:
        troubles = Troubles()
        config = parse(CONFIG, ServerConfig, "server.yaml")
        database = await Database.open("sqlite://", troubles)
        store = await Store.open(database, await Lease.take(database, "here", 36_000.0), SIGNS)
        artifacts = FolderArtifacts(folder)
        run = await Runs(
            config, Here(TASK, 0), store, lambda name: Checkpoints(artifacts, folder, name, config.run.keep_versions), troubles
        ).open(NOON)
        CALLER.set(Caller(CLIENT, Role.DEVICE, certified=True))  # the gate has let it through
        run.record = replace(run.record, nonce="00000000")  # so that a corpus has the names of this process
        sessions = Sessions(TASK.name, TASK.version, run.model.manifest)
        return cls(run, House(store, sessions, Transfers(2**20), troubles, 2**20, lambda: NOON), folder)

    @contextmanager
    def round(self, kind: Kind) -> Iterator[Collection]:
        """A round of one client, in which nothing has been done."""
        name = assignment_id(self.run.record, 0, CLIENT)
        opened = Round(self.run.record.name, 0, kind, 0, 1, 1, {name: Part(name, CLIENT)}, NOON)
        spool = self.spool.of(self.run.record.name, 0)
        collection = Collection(self.run, opened, spool, self.house)
        self.coordinator.attendance.collection = collection
        try:
            yield collection
        finally:
            self.coordinator.attendance.collection = None
            spool.clear()

    async def receives(self, kind: Kind, requests: Iterable[Any]) -> str:
        """The reason in the receipt of an upload; Raises Aborted. An accepted result ends the round, and makes a version."""
        with self.round(kind) as collection:
            collecting = asyncio.create_task(collection.collect())
            try:
                receipt = await self.service.Upload(_stream(requests), Call())  # type: ignore[arg-type]
            finally:
                collection.stop("the next input")
                after = await collecting
            if after.count(PartState.ACCEPTED):
                self._use(collection)
            return str(receipt.reason)

    def _use(self, collection: Collection) -> None:
        aggregate = collection.tally.aggregate
        if aggregate is None:
            return
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            path = Path(folder) / "weights"
            self.run.make_version(collection.round.kind, aggregate, path, Path(folder) / "state")
            for name, tensor in load_file(path).items():
                assert bool(tensor.isfinite().all()), f"an accepted result has made {name} infinite"

    async def attended(self, requests: Iterable[Any]) -> None:
        """Until the coordinator ends the stream. Raises Aborted."""
        task = asyncio.current_task()
        assert task is not None
        access.CALL.set(access.Call(task))  # as the gate does
        with self.round(Kind.TRAINING):
            await self.service.Attend(_stream(requests), Call())  # type: ignore[arg-type]


async def _no_other_run(rounds: int, parent: Run | None) -> NoReturn:
    raise AssertionError("nobody asks for another run")


async def _stream(messages: Iterable[Any]) -> AsyncIterator[Any]:
    for message in messages:
        yield message


class Answers:
    """A gRPC call whose answers are given."""

    def __init__(self, answers: Iterable[Any]) -> None:
        self._answers = iter(answers)

    async def read(self) -> Any:
        return next(self._answers, grpc.aio.EOF)

    async def write(self, _message: Any) -> None:
        pass

    async def done_writing(self) -> None:
        pass

    async def initial_metadata(self) -> None:
        pass

    async def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.OK

    def cancel(self) -> None:
        pass

    def __await__(self) -> Any:
        async def only() -> Any:
            return next(self._answers)

        return only().__await__()


class Stub:
    """gRPC's side of a transport: every call has the same answers."""

    def __init__(self, answers: Iterable[Any]) -> None:
        self._answers = list(answers)

    def __getattr__(self, _name: str) -> Any:
        return lambda *_: Answers(self._answers)


@contextmanager
def loop() -> Iterator[asyncio.Runner]:
    """An event loop for the life of a target."""
    with asyncio.Runner() as runner:
        yield runner


class Link:
    """A client's transport to a coordinator that says what was decoded."""

    def __init__(self) -> None:
        self.transport = GrpcTransport("127.0.0.1:1", None, CLIENT)

    def says(self, answers: Iterable[Any]) -> GrpcTransport:
        stub = Stub(answers)
        self.transport._stub = stub  # type: ignore[assignment]
        self.transport._download, self.transport._upload, self.transport._upload_whole = stub.Download, stub.Upload, stub.Upload
        return self.transport


HELLO_PARTS = {
    "protocol_version": PROTOCOL_VERSION,
    "client": CLIENT,
    "instance": "one",
    "task": TASK.name,
    "task_version": TASK.version,
}


def hello(manifest: Any) -> Hello:
    """What a good client says first."""
    return Hello(**HELLO_PARTS, manifest=manifest, examples=10, software="a fuzzer")
