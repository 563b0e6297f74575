from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable

import choral.errors
import grpc
import pytest
from choral.errors import ChoralError, Refused, Unreachable
from choral.status import abort, from_rpc
from choral.v1 import federation_pb2 as pb
from choral.v1 import federation_pb2_grpc
from google.protobuf import any_pb2
from google.rpc import status_pb2

TREE = [kind for kind in vars(choral.errors).values() if isinstance(kind, type) and issubclass(kind, ChoralError)]
MESSAGE = 'shard "naïve": 3 cells – 50 % – are empty;\nfill them in 🙂'


class Failing(federation_pb2_grpc.FederationServicer):
    """Ends every call with `error`."""

    error: Exception = ChoralError()

    async def Upload(self, requests: object, context: grpc.aio.ServicerContext) -> pb.UploadResponse:  # noqa: N802
        if isinstance(self.error, ChoralError):
            await abort(context, self.error)
        raise self.error

    async def Download(self, request: object, context: grpc.aio.ServicerContext) -> AsyncIterator[pb.DownloadResponse]:  # noqa: N802
        yield pb.DownloadResponse()
        await abort(context, self.error)  # type: ignore[arg-type]


@pytest.fixture
async def failing() -> AsyncIterator[tuple[Failing, str]]:
    servicer = Failing()
    server = grpc.aio.server()
    federation_pb2_grpc.add_FederationServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield servicer, f"127.0.0.1:{port}"
    await server.stop(None)


async def _raised(address: str, call: Callable[[federation_pb2_grpc.FederationStub], object]) -> ChoralError:
    async with grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call(federation_pb2_grpc.FederationStub(channel))  # type: ignore[misc]
    return from_rpc(raised.value, address)


async def _upload(stub: federation_pb2_grpc.FederationStub) -> None:
    await stub.Upload(iter([pb.UploadRequest()]))  # type: ignore[misc]


async def _download(stub: federation_pb2_grpc.FederationStub) -> None:
    async for _ in stub.Download(pb.DownloadRequest()):  # type: ignore[attr-defined]
        pass


@pytest.mark.parametrize("kind", TREE)
async def test_class_and_message_survive_a_call(failing: tuple[Failing, str], kind: type[ChoralError]) -> None:
    servicer, address = failing
    servicer.error = kind(MESSAGE)
    for call in (_upload, _download):
        error = await _raised(address, call)
        assert type(error) is kind
        assert str(error) == MESSAGE


async def test_a_class_from_a_later_release_arrives_as_a_refusal(failing: tuple[Failing, str]) -> None:
    class QuotaExceeded(Refused):
        grpc_code = "RESOURCE_EXHAUSTED"

    servicer, address = failing
    servicer.error = QuotaExceeded("come back tomorrow")
    error = await _raised(address, _upload)
    assert type(error) is Refused
    assert str(error) == "come back tomorrow"


async def test_an_error_without_a_message_still_says_its_name(failing: tuple[Failing, str]) -> None:
    servicer, address = failing
    servicer.error = choral.errors.NameTaken()
    error = await _raised(address, _upload)
    assert type(error) is choral.errors.NameTaken
    assert str(error) == "NameTaken"


async def test_a_crash_on_the_other_side_is_no_refusal_and_worth_another_try(failing: tuple[Failing, str]) -> None:
    servicer, address = failing
    servicer.error = ZeroDivisionError("division by zero")
    error = await _raised(address, _upload)
    assert type(error) is Unreachable
    assert str(error).startswith(f"no coordinator answers at {address} (")


async def test_nobody_there_is_worth_another_try() -> None:
    with socket.socket() as bound:  # holds the port without listening on it
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        error = await _raised(address, _upload)
    assert type(error) is Unreachable
    assert str(error).startswith(f"no coordinator answers at {address}")


def test_the_end_of_a_call_that_cannot_be_read_is_a_broken_link() -> None:
    """A proxy, or whoever claims to be the coordinator, may send anything: once it ended the client with a DecodeError."""
    unreadable = any_pb2.Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff")
    for details in (b"\xff", status_pb2.Status(details=[unreadable]).SerializeToString()):
        trailing = grpc.aio.Metadata(("grpc-status-details-bin", details))
        error = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), trailing, "gone")
        assert isinstance(from_rpc(error, "here:1"), Unreachable)
