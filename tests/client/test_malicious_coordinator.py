"""A coordinator that lies, over real gRPC, to the real agent, transport and work: each overreach is refused with its reason."""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import json
import math
import pickle
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
import yaml
from choral import Task, wire
from choral.errors import InvalidMessage
from choral.messages import Hello
from choral.v1 import federation_pb2 as pb
from choral.v1 import federation_pb2_grpc
from choral.v1 import model_pb2 as mb
from choral_client.agent import Agent
from choral_client.data import Shard
from choral_client.guard_file import GuardFile
from choral_client.oversight import Oversight
from choral_client.transport import GrpcTransport
from choral_client.work import Work
from pieces import pieces
from safetensors.torch import save
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset

PATIENCE_S = 60.0
NOON = datetime(2026, 11, 25, 12, 0)
MODEL = save({"weight": torch.zeros(1, 1), "bias": torch.zeros(1)})
ROOM = 8 + (1 << 20) + 2 * 1024  # what a checkpoint of that model can have at most
SHARD = Shard(TensorDataset(torch.ones(4, 1), torch.ones(4, 1)), TensorDataset(torch.ones(2, 1), torch.ones(2, 1)), 4)
OVER = pb.AttendResponse(come_back=pb.ComeBack(reason="all rounds completed"))


def version(content: bytes = MODEL, **lies: Any) -> mb.ModelVersion:
    said = {"number": 0, "digest": hashlib.sha256(content).digest(), "size_bytes": len(content)}
    return mb.ModelVersion(**said | lies)


def welcome(announced: mb.ModelVersion | None = None, **lies: Any) -> pb.AttendResponse:
    said = {"run": "run", "heartbeat_s": 3600.0, "version": version() if announced is None else announced}
    return pb.AttendResponse(welcome=pb.Welcome(**said | lies))


def asked(announced: mb.ModelVersion | None = None, id: str = "run/0/alice", **lies: Any) -> pb.AttendResponse:
    """An assignment; `lies` go into its plan."""
    said: dict[str, Any] = {"kind": mb.ROUND_KIND_TRAINING, "task": "small", "task_version": "1", "epochs": 1, "batch_size": 4}
    plan = pb.Plan(**said | {"learning_rate": 0.1, "cohort": 100} | lies)
    work = pb.Assignment(id=id, round=0, version=version() if announced is None else announced, plan=plan)
    return pb.AttendResponse(assignment=work)


class Liar(federation_pb2_grpc.FederationServicer):
    """Says `says`, hears until a part is declined or a result has arrived, and ends the run. Whatever is fetched is `content`."""

    def __init__(self, *says: pb.AttendResponse, content: bytes = MODEL) -> None:
        self.says = says
        self.content = content
        self.declined: list[str] = []
        self.downloads = 0
        self.uploads: list[pb.UploadHeader] = []
        self._arrived = asyncio.Event()

    async def Attend(self, requests: AsyncIterator[pb.AttendRequest], context: Any) -> AsyncIterator[pb.AttendResponse]:  # noqa: N802
        await anext(requests)
        for message in self.says:
            yield message
        hearing = asyncio.create_task(self._hear(requests))
        arriving = asyncio.create_task(self._arrived.wait())
        await asyncio.wait([hearing, arriving], return_when=asyncio.FIRST_COMPLETED)
        yield OVER
        await hearing

    async def _hear(self, requests: AsyncIterator[pb.AttendRequest]) -> None:
        async for request in requests:
            if request.status.phase == pb.PHASE_DECLINED:
                self.declined.append(request.status.reason)
                return

    async def Download(self, request: pb.DownloadRequest, context: Any) -> AsyncIterator[pb.DownloadResponse]:  # noqa: N802
        self.downloads += 1
        for chunk in pieces(self.content, request.offset):
            yield pb.DownloadResponse(chunk=chunk)

    async def ResumeUpload(self, request: pb.ResumeUploadRequest, context: Any) -> pb.ResumeUploadResponse:  # noqa: N802
        return pb.ResumeUploadResponse(offset=0)

    async def Upload(self, requests: AsyncIterator[pb.UploadRequest], context: Any) -> pb.UploadResponse:  # noqa: N802
        await context.send_initial_metadata(())
        async for request in requests:
            if request.HasField("header"):
                self.uploads.append(request.header)
        self._arrived.set()
        return pb.UploadResponse(verdict=pb.VERDICT_ACCEPTED)


async def meet(liar: Liar, home: Path, task: Task | None = None, follow: bool = False, place: str = "192.168.1.7") -> None:
    """A client's life with that coordinator; its guard is `guard.yaml` in its state folder, `home`."""
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", wire.MESSAGE_BYTES)])
    federation_pb2_grpc.add_FederationServicer_to_server(liar, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    transport = GrpcTransport(f"127.0.0.1:{port}", None, "alice")
    work = Work(task or Task("small", lambda: nn.Linear(1, 1), mse_loss, load=lambda path: TensorDataset()), SHARD)
    hello = Hello(wire.PROTOCOL_VERSION, "alice", "this start", "small", "1", work.manifest, SHARD.size, "a test")
    oversight = Oversight(GuardFile(home), home, lambda: ipaddress.ip_address(place), lambda: NOON)
    try:
        async with asyncio.timeout(PATIENCE_S):
            await Agent(transport, hello, work, home, follow=follow, oversight=oversight).live()
    finally:
        await transport.close()
        await server.stop(None)


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def guarded(home: Path, **keys: Any) -> None:
    (home / "guard.yaml").write_text(yaml.safe_dump(keys))


STATISTICS, EVALUATION = mb.ROUND_KIND_STATISTICS, mb.ROUND_KIND_EVALUATION


async def test_an_honest_coordinator_gets_a_result_from_a_careful_device(tmp_path: Path) -> None:
    """The other side of every bound at once; without it, the refusals below could be for any reason."""
    guarded(tmp_path, tasks={"small": ["1"]}, max_epochs=1, max_work_s=600.0, max_work_s_per_day=600.0, min_cohort=100)
    liar = Liar(welcome(), asked())
    await meet(liar, tmp_path)
    assert (liar.declined, len(liar.uploads), liar.downloads) == ([], 1, 1)


@pytest.mark.parametrize(
    ("keys", "lies", "reason"),
    [
        ({}, {"task": "other"}, "asked for task other 1; small 1 is installed here"),
        ({}, {"task_version": "2"}, "asked for task small 2; small 1 is installed here"),
        ({"tasks": {"small": ["2"]}}, {}, "does not allow task small 1; it allows small 2 (tasks)"),
        (
            {"tasks": {"other": ["1"]}},
            {"task": "other"},
            "asked for task other 1; small 1 is installed here",
        ),  # allowed, not installed
        ({"max_epochs": 5}, {"epochs": 6}, "does not allow 6 epochs; it allows at most 5 (max_epochs)"),
        ({"max_epochs": 5}, {"epochs": 100_000}, "does not allow 100000 epochs"),
        ({"min_cohort": 10}, {"cohort": 1}, "does not allow a cohort of 1; it allows at least 10 (min_cohort)"),
        ({"min_cohort": 1}, {"cohort": 0}, "does not allow a cohort of 0"),
        ({"secure_aggregation": True}, {}, "requires secure_aggregation"),
        ({"secure_aggregation": True}, {"kind": STATISTICS}, "requires secure_aggregation"),
        ({"secure_aggregation": True}, {"kind": EVALUATION, "evaluate": True}, "requires secure_aggregation"),
        ({"max_epsilon": 8.0}, {}, "bounds the privacy that may be lost (max_epsilon: 8)"),
        ({"max_epsilon": 8.0}, {"kind": STATISTICS}, "bounds the privacy that may be lost"),
        ({"max_epsilon": 8.0}, {"kind": EVALUATION, "evaluate": True}, "bounds the privacy that may be lost"),
        ({"hours": ["22:00-06:00"]}, {}, "does not allow work at 12:00; it allows 22:00-06:00 (hours)"),
        ({"networks": ["10.0.0.0/8"]}, {}, "does not allow work from 192.168.1.7; it allows 10.0.0.0/8 (networks)"),
    ],
)
async def test_what_the_guard_does_not_allow_is_declined_before_anything_is_fetched(
    tmp_path: Path, keys: dict[str, Any], lies: dict[str, Any], reason: str
) -> None:
    guarded(tmp_path, **keys)
    liar = Liar(welcome(), asked(**lies))
    await meet(liar, tmp_path)
    assert len(liar.declined) == 1
    assert reason in liar.declined[0]
    assert (liar.uploads, liar.downloads) == ([], 0)
    assert tree(tmp_path) == {"guard.yaml", "status.json"}


@pytest.mark.parametrize(
    ("content", "reason"), [("max_epochs: lots", "max_epochs: 'lots' is not allowed"), (None, "put the guard back")]
)
async def test_a_guard_that_breaks_while_the_client_runs_declines_everything(
    tmp_path: Path, content: str | None, reason: str
) -> None:
    guard = tmp_path / "guard.yaml"
    guard.write_text("max_epochs: 5")

    class Meanwhile(Liar):
        async def Attend(self, requests: AsyncIterator[pb.AttendRequest], context: Any) -> AsyncIterator[pb.AttendResponse]:  # noqa: N802
            guard.unlink() if content is None else guard.write_text(content)
            async for message in super().Attend(requests, context):
                yield message

    liar = Meanwhile(welcome(), asked())
    await meet(liar, tmp_path, follow=True)
    assert "this device's guard cannot be used, so nothing is done" in liar.declined[0]
    assert reason in liar.declined[0]
    assert (liar.uploads, liar.downloads) == ([], 0)


@pytest.mark.parametrize("key", ["max_work_s", "max_work_s_per_day"])
async def test_work_without_end_is_stopped(tmp_path: Path, key: str) -> None:
    guarded(tmp_path, **{key: 0.3})
    liar = Liar(welcome(), asked(epochs=100_000, batch_size=1))
    await meet(liar, tmp_path)
    assert f"({key})" in liar.declined[0]
    assert liar.uploads == []


async def test_the_hours_hold_for_versions_that_nobody_is_asked_to_work_on(tmp_path: Path) -> None:
    guarded(tmp_path, hours=["22:00-06:00"])
    liar = Liar(welcome(), pb.AttendResponse(new_version=pb.NewVersion(version=version())), asked())
    await meet(liar, tmp_path, follow=True)
    assert liar.downloads == 0


async def test_a_result_that_was_saved_under_another_guard_is_not_sent(tmp_path: Path) -> None:
    """The coordinator takes no result, so that it is kept; its owner has thought better of it when the client starts again."""

    class Deaf(Liar):
        async def Upload(self, requests: AsyncIterator[pb.UploadRequest], context: Any) -> pb.UploadResponse:  # noqa: N802
            self._arrived.set()
            await context.abort(grpc.StatusCode.UNAVAILABLE, "later")
            raise AssertionError

    await meet(Deaf(welcome(), asked()), tmp_path)
    assert len(list((tmp_path / "outbox").iterdir())) == 1
    guarded(tmp_path, secure_aggregation=True)
    liar = Liar(welcome(), asked())
    await meet(liar, tmp_path)
    assert "requires secure_aggregation" in liar.declined[0]
    assert liar.uploads == []
    assert list((tmp_path / "outbox").iterdir()) == []


# Lies that the contract itself refuses: the client ends with the reason


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        *[([welcome(heartbeat_s=value)], "the pause between heartbeats") for value in (0.0, 1e-9, -1.0, 1e12, math.inf, math.nan)],
        *[
            ([welcome(), pb.AttendResponse(come_back=pb.ComeBack(after_s=value))], "the time until the client is to come back")
            for value in (-1.0, 1e12, math.inf, math.nan)
        ],
        ([welcome(version(digest=b"../../etc"))], "the digest of version 0 has 9 bytes; a SHA-256 has 32"),
        ([welcome(version(size_bytes=-1))], "version 0 is announced with -1 bytes"),
        ([welcome(), asked(epochs=-1)], "a plan that is not allowed"),
        ([welcome(), asked(batch_size=0)], "a plan that is not allowed"),
        ([welcome(), asked(learning_rate=math.inf)], "a plan that is not allowed"),
        ([welcome(), asked(cohort=-1)], "a plan that is not allowed: a cohort of -1"),
        ([welcome(), welcome()], "welcomes this client twice"),
    ],
)
async def test_what_breaks_the_contract_ends_the_client(tmp_path: Path, says: list[pb.AttendResponse], reason: str) -> None:
    liar = Liar(*says)
    with pytest.raises(InvalidMessage, match=reason):
        await meet(liar, tmp_path)
    assert (liar.uploads, liar.downloads) == ([], 0)


# Versions


class Bomb:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "unpickled")


@pytest.mark.parametrize("follow", [True, False])
@pytest.mark.parametrize(
    ("content", "lies", "downloads", "reason"),
    [
        (MODEL, {"size_bytes": 1 << 60}, 0, f"announced with {1 << 60} bytes; one of the model installed here has at most {ROOM}"),
        (MODEL, {"size_bytes": ROOM + 1}, 0, f"has at most {ROOM}"),
        (MODEL, {"digest": bytes(32)}, 4, "arrived with another digest than was announced"),
        (MODEL + bytes(1 << 20), {"size_bytes": len(MODEL)}, 4, "bytes arrived where"),
        (save({"weight": torch.zeros(1, 2), "bias": torch.zeros(1)}), {}, 1, "tensor 'weight' is F32 [1, 2] where F32 [1, 1] is"),
        (save({"other": torch.zeros(1)}), {}, 1, "the version is of another model than the task installed here"),
        (pickle.dumps(Bomb(Path("unpickled"))), {}, 1, "the version is no safetensors file"),
        (b"PK\x03\x04" + bytes(100), {}, 1, "the version is no safetensors file"),
    ],
)
async def test_a_version_that_is_a_lie_is_declined_and_the_last_good_model_stays(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
    lies: dict[str, Any],
    downloads: int,
    reason: str,
    follow: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"the last good model")
    announced = version(content, number=3, **lies)
    liar = Liar(welcome(announced), asked(announced), content=content)
    await meet(liar, tmp_path, follow=follow)
    assert len(liar.declined) == 1
    assert reason in liar.declined[0]
    assert liar.uploads == []
    assert liar.downloads >= downloads
    assert (liar.downloads == 0) == (downloads == 0)
    assert tree(tmp_path) == {"model.safetensors", "status.json"}
    assert (tmp_path / "model.safetensors").read_bytes() == b"the last good model"


# Names, floods, files


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "a/../../b", "x\0y", "..", "", "a" * 100_000])
async def test_no_name_leads_out_of_the_state_folder(tmp_path: Path, name: str) -> None:
    home = tmp_path / "deep" / "state"
    home.mkdir(parents=True)
    before = tree(tmp_path)
    liar = Liar(welcome(run=name, notice=name), pb.AttendResponse(cancel=pb.Cancel(assignment=name, reason=name)), asked(id=name))
    await meet(liar, home)
    assert [upload.assignment for upload in liar.uploads] == [wire.brief(name)]
    new = tree(tmp_path) - before
    assert new == {f"deep/state/{inside}" for inside in ("model.safetensors", "outbox", "status.json")}
    assert (home / "status.json").stat().st_size < 2 * wire.WORDS


async def test_a_flood_of_assignments_does_not_pile_up(tmp_path: Path) -> None:
    """While the first one's training stands in a batch, hundreds come: besides it, only the last one is ever begun."""
    begun, go_on, losses = threading.Event(), threading.Event(), []

    def slow(prediction: Any, target: Any) -> Any:
        losses.append(1)
        begun.set()
        assert go_on.wait(PATIENCE_S)
        return mse_loss(prediction, target)

    class Flood(Liar):
        async def Attend(self, requests: AsyncIterator[pb.AttendRequest], context: Any) -> AsyncIterator[pb.AttendResponse]:  # noqa: N802
            await anext(requests)
            yield welcome()
            yield asked(id="first")
            await asyncio.to_thread(begun.wait, PATIENCE_S)
            for number in range(500):
                yield asked(id=f"flood {number}")
            yield asked(id="last")
            async for request in requests:  # the last one waits for its turn
                if request.status.assignment == "last" and request.status.phase == pb.PHASE_WORKING:
                    break
            go_on.set()
            await self._arrived.wait()
            yield OVER
            async for _ in requests:
                pass

    liar = Flood()
    await meet(liar, tmp_path, Task("small", lambda: nn.Linear(1, 1), slow, load=lambda path: TensorDataset()))
    assert [upload.assignment for upload in liar.uploads] == ["last"]
    assert len(losses) == 2  # one batch each


SPY = """
    import asyncio, json, sys
    from pathlib import Path

    opened = []

    def spy(event, arguments):
        if event == "open" and not isinstance(arguments[0], int):  # a number is a file that is open already
            opened.append(str(arguments[0]))

    sys.addaudithook(spy)

    from choral.config import parse
    from choral_client.app import attend
    from choral_client.config import ClientConfig

    del opened[:]
    told = {"server": sys.argv[1], "name": "alice", "task": "their_task:task", "data": "shard.csv", "state": "state"}
    try:
        asyncio.run(attend(parse(told | {"plaintext": True, "holdout": 0.0}, ClientConfig, "test")))
    finally:
        print(json.dumps(opened))
"""
TASK = """
    from choral import Table, Task
    from torch import nn
    from torch.nn.functional import mse_loss

    task = Task("small", lambda: nn.Linear(1, 1), mse_loss, load=Table(["x"], target="y"))
"""


@pytest.mark.parametrize("kind", [mb.ROUND_KIND_TRAINING, STATISTICS])
async def test_no_file_but_the_shard_is_opened_as_data(tmp_path: Path, kind: int) -> None:
    """In a process of its own, in which Python tells of each file that is opened, for a coordinator that names others."""
    (tmp_path / "spy.py").write_text(textwrap.dedent(SPY))
    (tmp_path / "their_task.py").write_text(textwrap.dedent(TASK))
    for name in ("shard.csv", "diary.csv", "other.csv"):
        (tmp_path / name).write_text("x,y\n1,2\n3,4\n")
    secret = str(tmp_path / "diary.csv")
    liar = Liar(welcome(run=secret), asked(id=secret, kind=kind))
    server = grpc.aio.server()
    federation_pb2_grpc.add_FederationServicer_to_server(liar, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        command = [sys.executable, "spy.py", f"127.0.0.1:{port}"]
        ended = await asyncio.to_thread(
            subprocess.run, command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
    finally:
        await server.stop(None)
    assert (ended.returncode, len(liar.uploads), liar.declined) == (0, 1, []), ended.stderr
    opened = {path if path.startswith("/") else str(tmp_path / path) for path in json.loads(ended.stdout.splitlines()[-1])}
    ours = {Path(path).relative_to(tmp_path).parts[0] for path in opened if path.startswith(f"{tmp_path}/")}
    assert ours <= {"shard.csv", "state", "their_task.py", "__pycache__"}
    assert "shard.csv" in ours
    others = {path for path in opened if not path.startswith(f"{tmp_path}/")}
    assert not [path for path in others if path.endswith((".csv", ".parquet", ".db", ".sqlite", ".pt", ".pkl"))]
