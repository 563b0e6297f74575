"""What comes over the network: at the coordinator from clients, at a client from what claims to be its coordinator."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import grpc
import numpy as np
from choral import wire
from choral.errors import ChoralError, InvalidMessage
from choral.flat import describe
from choral.manifest import first_difference
from choral.messages import (
    Assignment,
    Cancel,
    ComeBack,
    FromCoordinator,
    Heartbeat,
    NewVersion,
    Phase,
    Receipt,
    Status,
    UploadHeader,
    Verdict,
    VersionRef,
    Welcome,
)
from choral.metrics import Metric
from choral.plan import Kind, Plan, Training
from choral.status import DOMAIN, from_rpc
from choral.v1 import federation_pb2 as pb
from choral.v1 import model_pb2 as mb
from choral_client.backoff import Patience
from choral_client.checkpoint import Expected
from choral_client.model_file import ModelFile
from fuzz.house import CLIENT, TASK, Aborted, Call, Floor, Link, hello, loop
from fuzz.target import Decode, Make, Target, framed, in_memory, pieces_of
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from pieces import piece as piece_of
from safetensors.torch import save

TOLD = 3000  # characters: twice, and encoded, they must fit into the 8 KiB that gRPC has for the end of a call
ASSIGNMENT = f"run/0/{CLIENT}/00000000"
BYTES = {Kind.TRAINING: 4 * 5, Kind.STATISTICS: 8 * 5, Kind.EVALUATION: 0}
WEIGHTS = save(TASK.initial_model(0).state_dict())
VERSION = VersionRef(3, hashlib.sha256(WEIGHTS).digest(), len(WEIGHTS))


@cache
def manifest() -> Any:
    return describe(TASK.initial_model(0))


def decoded(kind: type[Message], pieces: Sequence[bytes]) -> list[Any]:
    """As gRPC decodes them. Raises DecodeError."""
    return [kind.FromString(piece) for piece in pieces]


# At the coordinator


def attendance(folder: Path) -> Any:
    return _at_coordinator(folder, lambda floor, data: floor.attended(decoded(pb.AttendRequest, pieces_of(data))))


def attendance_seeds() -> list[bytes]:
    said = [hello(manifest()), Heartbeat(), Status(ASSIGNMENT, Phase.WORKING), Status(ASSIGNMENT, Phase.DECLINED, "no power")]
    messages = [wire.from_client_to_pb(one).SerializeToString() for one in said]
    return [framed(messages[:count]) for count in (1, 2, 4)]


def upload_of(kind: Kind) -> Make:
    def make(folder: Path) -> Any:
        async def received(floor: Floor, data: bytes) -> None:
            _check(await floor.receives(kind, pieces_of(data)))

        return _at_coordinator(folder, received)

    return make


def payload_of(kind: Kind) -> Make:
    """Bytes that arrive just as they were announced."""

    def make(folder: Path) -> Any:
        async def received(floor: Floor, data: bytes) -> None:
            payload = data[: BYTES[kind]].ljust(BYTES[kind], b"\0")
            _check(await floor.receives(kind, upload(kind, payload)))

        return _at_coordinator(folder, received)

    return make


def resumption(folder: Path) -> Any:
    async def asked(floor: Floor, data: bytes) -> None:
        with floor.round(Kind.TRAINING):
            answer = await floor.service.ResumeUpload(pb.ResumeUploadRequest.FromString(data), Call())  # type: ignore[arg-type]
            _check(answer.receipt.reason)

    return _at_coordinator(folder, asked)


@contextmanager
def _at_coordinator(folder: Path, decode: Callable[[Floor, bytes], Any]) -> Iterator[Decode]:
    with loop() as runner:
        floor = runner.run(Floor.open(folder))
        yield lambda data: runner.run(decode(floor, data))
        runner.run(floor.house.store._database.close())


def _check(reason: str) -> None:
    assert len(reason) <= TOLD, f"a receipt with {len(reason)} characters"


def payload(kind: Kind) -> bytes:
    number = {Kind.TRAINING: "<f4", Kind.STATISTICS: "<f8", Kind.EVALUATION: "<f4"}[kind]
    count = {Kind.TRAINING: 5, Kind.STATISTICS: 5, Kind.EVALUATION: 0}[kind]
    return np.arange(1, 1 + count, dtype=number).tobytes()


def header(kind: Kind, content: bytes, **changes: Any) -> UploadHeader:
    digest = hashlib.sha256(content).digest()
    said = {"held_out": (Metric("loss", 0.5, 20),), "work": (Metric("train_s", 1.5, 10),)}
    return UploadHeader(**{"offset": 0, **said, **changes}, **_same(kind, content, digest))


def _same(kind: Kind, content: bytes, digest: bytes) -> dict[str, Any]:
    named = {"assignment": ASSIGNMENT, "client": CLIENT, "examples": 10}
    return {**named, "kind": kind, "payload_bytes": len(content), "digest": digest}


def upload(kind: Kind, content: bytes, size: int = 8, **changes: Any) -> list[bytes]:
    """The messages of an upload, in chunks of `size` bytes."""
    announced = header(kind, content, **changes)
    offsets = range(max(announced.offset, 0), len(content), size)
    chunks = [piece_of(content[offset : offset + size], offset) for offset in offsets]
    messages = [
        pb.UploadRequest(header=wire.header_to_pb(announced)),
        *(pb.UploadRequest(chunk=chunk) for chunk in chunks),
        pb.UploadRequest(trailer=pb.UploadTrailer(chunks=len(chunks))),
    ]
    return [message.SerializeToString() for message in messages]


def upload_seeds(kind: Kind) -> Callable[[], list[bytes]]:
    return lambda: [framed(upload(kind, payload(kind), size)) for size in (8, 1000)]


def payload_seeds(kind: Kind) -> Callable[[], list[bytes]]:
    bad = np.array([math.nan, math.inf, -1e30, 1e-45, 0.0], dtype="<f4" if kind is Kind.TRAINING else "<f8").tobytes()
    return lambda: [payload(kind), bad]


def upload_hostile() -> list[bytes]:
    """Measurements with names by the yard, or that are no numbers; bytes without end; more than one of what there is one of."""
    long = [Metric("x" * 2000, 1.0, 1)] * 10
    content = payload(Kind.TRAINING)
    good = upload(Kind.TRAINING, content)
    return [
        framed(upload(Kind.TRAINING, content, work=tuple(long))),
        framed(upload(Kind.TRAINING, content, held_out=tuple(long))),
        framed(upload(Kind.TRAINING, content, held_out=(Metric("loss", math.nan, 1),))),
        framed(upload(Kind.TRAINING, content, work=(Metric("", -math.inf, 2**62),))),
        framed(upload(Kind.TRAINING, content, offset=-(2**63))),
        framed([*good, *good]),
        framed([good[0], *good[1:-1] * 50]),
        framed([good[-1]]),
        framed([good[0], good[-1]]),
    ]


def manifest_seeds() -> list[bytes]:
    return [wire.manifest_to_pb(manifest()).SerializeToString()]


def manifest_hostile() -> list[bytes]:
    entries = [
        mb.ManifestEntry(name="x" * 20_000, dtype="F32", shape=[1], kind=mb.ENTRY_KIND_AVERAGED),
        mb.ManifestEntry(name="x", dtype="y" * 20_000, shape=[1], kind=mb.ENTRY_KIND_AVERAGED),
        mb.ManifestEntry(name="x", dtype="F32", shape=[2**63 - 1] * 1000, kind=mb.ENTRY_KIND_AVERAGED),
        mb.ManifestEntry(name="x", dtype="F32", shape=[-1, 0], offset=-1, kind=mb.ENTRY_KIND_COUNTER),
    ]
    return [mb.Manifest(entries=[entry]).SerializeToString() for entry in entries]


def attendance_hostile() -> list[bytes]:
    good = wire.from_client_to_pb(hello(manifest()))
    messages = []
    for changes in ({"instance": "x" * 20_000}, {"client": ".." * 500}, {"task": "x" * 20_000}, {"examples": -(2**63)}):
        message = pb.AttendRequest.FromString(good.SerializeToString())
        for name, value in changes.items():
            setattr(message.hello, name, value)
        messages.append(message.SerializeToString())
    whole = [
        pb.AttendRequest(
            hello=pb.Hello(protocol_version=wire.PROTOCOL_VERSION, client=CLIENT, manifest=mb.Manifest.FromString(one))
        )
        for one in manifest_hostile()
    ]
    for message in whole:
        message.hello.task, message.hello.task_version = TASK.name, TASK.version
    return [framed([message]) for message in [*messages, *(message.SerializeToString() for message in whole)]]


def manifest_decoded(data: bytes) -> None:
    theirs = wire.manifest_from_pb(mb.Manifest.FromString(data))
    assert isinstance(theirs.size, int)
    if (difference := first_difference(manifest(), theirs)) is not None:
        raise InvalidMessage(difference)


# At a client


def heard(folder: Path) -> Any:
    async def listened(link: Link, data: bytes) -> None:
        async with link.says(decoded(pb.AttendResponse, pieces_of(data))).attend(hello(manifest())) as stream:
            async for message in stream.heard():
                _check_obeyable(message)

    return _at_client(listened)


def _check_obeyable(message: FromCoordinator) -> None:
    """What a client does with it must be possible: it sleeps so long, and a name of so many bytes."""
    match message:
        case Welcome():
            assert 0 < message.heartbeat_s < math.inf, f"a heartbeat each {message.heartbeat_s} s"
        case ComeBack(after_s) if after_s is not None:
            assert 0 <= after_s < math.inf, f"come back in {after_s} s"
    version = getattr(message, "version", None)
    assert version is None or (len(version.digest) == 32 and version.size_bytes >= 0), f"{version}"


def heard_seeds() -> list[bytes]:
    plan = Plan(Kind.TRAINING, TASK.name, TASK.version, Training(), 7, True)
    said: list[FromCoordinator] = [
        Welcome("run", 15.0, VERSION, "hello"),
        Assignment(ASSIGNMENT, 0, VERSION, plan),
        Cancel(ASSIGNMENT, "closed"),
        NewVersion(VERSION),
        ComeBack(5.0, "later"),
        ComeBack(None, "over"),
    ]
    messages = [wire.from_coordinator_to_pb(one).SerializeToString() for one in said]
    return [framed(messages), *(framed([message]) for message in messages)]


def heard_hostile() -> list[bytes]:
    """What would keep a client busy, or upset its event loop; and a plan without end."""
    times = (0.0, -1.0, math.nan, math.inf, 1e308)
    said: list[FromCoordinator] = [
        *(Welcome("run", seconds, VERSION, "") for seconds in times),
        *(ComeBack(seconds, "") for seconds in times),
        NewVersion(VersionRef(-1, b"", -1)),
        NewVersion(VersionRef(2**63 - 1, bytes(1000), 2**63 - 1)),
    ]
    return [framed([wire.from_coordinator_to_pb(one).SerializeToString()]) for one in said]


def download(folder: Path) -> Any:
    """The version that is announced, and then the pieces in which it comes."""

    async def fetched(link: Link, data: bytes) -> None:
        first, *rest = pieces_of(data) or [b""]
        version = wire.version_from_pb(mb.ModelVersion.FromString(first))
        model = ModelFile(link.says(rest), folder, _Impatient(Random(0)), Expected(manifest()))
        with await model.obtain(version) as file:
            assert hashlib.sha256(file.read()).digest() == version.digest

    return _at_client(fetched)


class _Impatient(Patience):
    """Waits for nothing: the same will come again."""

    async def pause(self, failures: int) -> None:
        pass


def download_seeds() -> list[bytes]:
    announced = wire.version_to_pb(VERSION).SerializeToString()
    half = len(WEIGHTS) // 2
    pieces = [piece_of(WEIGHTS[:half], 0), piece_of(WEIGHTS[half:], half)]
    for_each = [pb.DownloadResponse(chunk=piece).SerializeToString() for piece in pieces]
    return [framed([announced, *for_each]), framed([announced])]


def download_hostile() -> list[bytes]:
    versions = [VersionRef(3, b"", 7), VersionRef(3, VERSION.digest, 2**63 - 1), VersionRef(3, b"../../../escaped", -1)]
    piece = pb.DownloadResponse(chunk=piece_of(WEIGHTS, 0)).SerializeToString()
    announced = [framed([wire.version_to_pb(version).SerializeToString(), piece]) for version in versions]
    others = [b"weights", WEIGHTS.replace(b"F32", b"F64"), WEIGHTS.replace(b"F32", b"F8_E5M2"), b"\xff" * 7 + b"\x7f{}"]
    return [*announced, *map(_published, others)]


def _published(content: bytes) -> bytes:
    """What a coordinator publishes as a version, with its true digest."""
    version = VersionRef(3, hashlib.sha256(content).digest(), len(content))
    piece = pb.DownloadResponse(chunk=piece_of(content, 0))
    return framed([wire.version_to_pb(version).SerializeToString(), piece.SerializeToString()])


def resumed(folder: Path) -> Any:
    async def asked(link: Link, data: bytes) -> None:
        announced = header(Kind.TRAINING, payload(Kind.TRAINING))
        answer = await link.says([pb.ResumeUploadResponse.FromString(data)]).resume(announced)
        assert isinstance(answer, Receipt) or 0 <= answer <= announced.payload_bytes

    return _at_client(asked)


def resumed_seeds() -> list[bytes]:
    answers: list[int | Receipt] = [0, 8, Receipt(Verdict.LATE, "too late")]
    return [wire.resumption_to_pb(answer).SerializeToString() for answer in answers]


def receipt(folder: Path) -> Any:
    async def sent(link: Link, data: bytes) -> None:
        content = payload(Kind.TRAINING)
        await link.says([pb.UploadResponse.FromString(data)]).upload(header(Kind.TRAINING, content), memoryview(content))

    return _at_client(sent)


def receipt_seeds() -> list[bytes]:
    return [wire.receipt_to_pb(Receipt(verdict, "a reason")).SerializeToString() for verdict in Verdict]


@contextmanager
def _at_client(decode: Callable[[Link, bytes], Any]) -> Iterator[Decode]:
    with loop() as runner:

        async def begin() -> Link:
            return Link()

        link = runner.run(begin())
        yield lambda data: runner.run(decode(link, data))
        runner.run(link.transport.close())


def refusal(data: bytes) -> None:
    """The end of a call: its code and words in one byte and a line, then the status with details."""
    code = list(grpc.StatusCode)[data[0] % len(grpc.StatusCode)] if data else grpc.StatusCode.UNKNOWN
    details, _, rest = data[1:].partition(b"\n")
    trailing = grpc.aio.Metadata(("grpc-status-details-bin", rest))
    error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details.decode("utf-8", "replace"))
    assert isinstance(from_rpc(error, "127.0.0.1:1"), ChoralError)


def refusal_seeds() -> list[bytes]:
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason="NameTaken", domain=DOMAIN))
    status = status_pb2.Status(code=6, message="taken", details=[detail])
    return [b"\x06taken\n" + status.SerializeToString(), b"\x0eSSL_ERROR_SSL\n"]


def _clients_names() -> tuple[bytes, ...]:
    return (ASSIGNMENT.encode(), CLIENT.encode(), TASK.name.encode(), b"loss", b"mse")


_ENDED = (Aborted, DecodeError)  # gRPC answers itself what it cannot decode
TARGETS = [
    Target("attendance of a client", attendance, attendance_seeds, _ENDED, _clients_names(), told=TOLD, hostile=attendance_hostile),
    Target(
        "manifest",
        in_memory(manifest_decoded),
        manifest_seeds,
        (InvalidMessage, DecodeError),
        (b"F32", b"BF16"),
        told=TOLD,
        hostile=manifest_hostile,
    ),
    *(
        Target(
            f"upload of {kind.value}",
            upload_of(kind),
            upload_seeds(kind),
            _ENDED,
            _clients_names(),
            told=TOLD,
            hostile=upload_hostile,
        )
        for kind in (Kind.TRAINING, Kind.STATISTICS, Kind.EVALUATION)
    ),
    *(
        Target(f"payload of {kind.value}", payload_of(kind), payload_seeds(kind), _ENDED, told=TOLD)
        for kind in (Kind.TRAINING, Kind.STATISTICS)
    ),
    Target("question about an upload", resumption, lambda: [_question()], _ENDED, _clients_names(), told=TOLD),
    Target("attendance at a client", heard, heard_seeds, (ChoralError, DecodeError), _clients_names(), hostile=heard_hostile),
    Target("download", download, download_seeds, (ChoralError, DecodeError), hostile=download_hostile),
    Target("answer about an upload", resumed, resumed_seeds, (ChoralError, DecodeError)),
    Target("receipt", receipt, receipt_seeds, (ChoralError, DecodeError)),
    Target("refusal of a call", in_memory(refusal), refusal_seeds, (), (b"type.googleapis.com/google.rpc.ErrorInfo", b"choral.v1")),
]


def _question() -> bytes:
    content = payload(Kind.TRAINING)
    return pb.ResumeUploadRequest(header=wire.header_to_pb(header(Kind.TRAINING, content))).SerializeToString()
