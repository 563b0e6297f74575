"""A client that says exactly what a test wants said, over gRPC to a real coordinator."""

from __future__ import annotations

import hashlib
import queue
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
from choral.flat import describe
from choral.names import is_name
from choral.v1 import federation_pb2 as pb
from choral.v1 import federation_pb2_grpc, model_pb2
from choral.wire import PROTOCOL_VERSION, manifest_to_pb
from e2e.federation import PATIENCE_S, Federation
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from pieces import pieces
from torch import nn

MANIFEST = manifest_to_pb(describe(nn.Linear(2, 1)))
"""Of the small task's model: three averaged numbers."""


def hello(name: str, **changes: Any) -> pb.AttendRequest:
    """The first word of a client with the small task."""
    said = {
        "protocol_version": PROTOCOL_VERSION,
        "client": name,
        "instance": f"{name}'s only start",
        "task": "small",
        "task_version": "1",
        "manifest": MANIFEST,
        "examples": 10,
        "software": "a test",
    }
    return pb.AttendRequest(hello=pb.Hello(**said | changes))


def refusal(error: grpc.RpcError) -> tuple[grpc.StatusCode, str, str]:
    """Of a call that was refused: its code, the reason's name, and the words for people."""
    status = rpc_status.from_call(error)
    assert status is not None, f"{error.code()}: {error.details()}"
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "choral.v1"
    return error.code(), info.reason, error.details()


def delta(*values: float) -> bytes:
    """A training result's payload."""
    return np.array(values, dtype="<f4").tobytes()


def client_of(assignment: str) -> str:
    """To whom an assignment, run/round/client/nonce, was given."""
    return dict(enumerate(assignment.split("/"))).get(2, "")


class Scripted:
    """An attendance. Whatever it says is said by the test; it shows the certificate of `member`, else of whom it says to be."""

    def __init__(self, federation: Federation, *first: pb.AttendRequest, member: str | None = None) -> None:
        self._says: queue.SimpleQueue[pb.AttendRequest | None] = queue.SimpleQueue()
        said = next((message.hello.client for message in first), "")
        self._channel = federation.secure_channel(member or (said if is_name(said) else "somebody"))
        self.stub = federation_pb2_grpc.FederationStub(self._channel)
        for message in first:
            self.say(message)
        self._call = self.stub.Attend(iter(self._says.get, None), timeout=PATIENCE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.leave()

    def leave(self) -> None:
        """End the link, as a device does that loses its network."""
        self._says.put(None)
        self._call.cancel()
        self._channel.close()

    def say(self, message: pb.AttendRequest) -> None:
        """Say something on the stream."""
        self._says.put(message)

    def hear(self, kind: str) -> Any:
        """The next message of this kind."""
        for message in self._call:
            if message.WhichOneof("message") == kind:
                return getattr(message, kind)
        raise AssertionError(f"the stream ended without {kind}")

    def header(self, assignment: str, **changes: Any) -> pb.UploadHeader:
        """The header of a good training result for the small task; `upload` fills in the digest of what it sends."""
        said = {"assignment": assignment, "client": client_of(assignment), "examples": 10, "payload_bytes": 12}
        digest = hashlib.sha256(delta(1, 2, 3)).digest()
        return pb.UploadHeader(**said | {"payload": pb.PAYLOAD_KIND_DELTA, "digest": digest} | changes)

    def upload(
        self,
        header: pb.UploadHeader,
        chunks: Sequence[model_pb2.Chunk] | None = None,
        trailer: int | None = None,
    ) -> pb.UploadResponse:
        """Send a result: by default one good chunk of 1, 2, 3, and the right trailer."""
        chunks = pieces(delta(1, 2, 3)) if chunks is None else chunks
        count = len(chunks) if trailer is None else trailer
        if chunks != pieces(delta(1, 2, 3)):
            whole = pb.UploadHeader()
            whole.CopyFrom(header)
            header = whole
            header.digest = hashlib.sha256(b"".join(chunk.data for chunk in chunks)).digest()
        return self.send(
            [
                pb.UploadRequest(header=header),
                *(pb.UploadRequest(chunk=chunk) for chunk in chunks),
                pb.UploadRequest(trailer=pb.UploadTrailer(chunks=count)),
            ]
        )

    def send(self, requests: Iterable[pb.UploadRequest]) -> pb.UploadResponse:
        """Send the messages of an upload as they are."""
        answer: pb.UploadResponse = self.stub.Upload(iter(requests), timeout=PATIENCE_S)
        return answer

    def download(self, version: int, offset: int = 0) -> Iterator[pb.DownloadResponse]:
        """Fetch a version."""
        return self.stub.Download(pb.DownloadRequest(version=version, offset=offset), timeout=PATIENCE_S)
