"""Errors over gRPC: a `ChoralError` becomes a google.rpc.Status with an ErrorInfo, and back."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from choral.errors import ChoralError, LimitExceeded, TrustError, Unreachable, by_name

DOMAIN = "choral.v1"
_LINK_BROKEN = {  # INTERNAL and UNKNOWN: what proxies make of a stream that breaks, and gRPC of a mistake in our own code
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
}

# What gRPC 1.62 to 1.85 say of a certificate that they do not accept; it has no status code of its own.
_NOT_TRUSTED = ("SSL_ERROR_SSL", "Hostname Verification", "CERTIFICATE_VERIFY_FAILED", "Peer name")
_CLOSED = "Socket closed"  # all that is heard of a certificate that the other side refuses
_LOCAL_FAILURE = "Internal error from Core"  # gRPC's word for a call that ended under its feet, whatever the reason


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: ChoralError) -> NoReturn:
    """End the call with `error`: its gRPC code, its message, and its class name as ErrorInfo.reason."""
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=DOMAIN))
    code = grpc.StatusCode[error.grpc_code]
    status = rpc_status.to_status(status_pb2.Status(code=code.value[0], message=str(error), details=[detail]))
    await context.abort(status.code, status.details, status.trailing_metadata)
    raise AssertionError("abort returns never")


def from_rpc(error: grpc.aio.AioRpcError, address: str) -> ChoralError:
    """The `ChoralError` behind a failed call to `address`."""
    reason = reason_of(error)
    if reason is not None:
        return by_name(reason)(error.details() or reason)
    details = error.details() or error.code().name
    if "WRONG_VERSION_NUMBER" in details:
        return TrustError(f"what answers at {address} does not speak TLS: look at the port, and at the coordinator's tls")
    if any(sign in details for sign in _NOT_TRUSTED):
        return TrustError(
            f"the coordinator at {address} shows a certificate that the given CA did not sign for that name ({details}): "
            "use an address that was given to `choral server init` with --host; if it was set up anew, enrol again with a new token"
        )
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:  # gRPC's own limits, of which our code does not hear
        return LimitExceeded(f"the coordinator at {address} does not take that much: {details}")
    if error.code() in _LINK_BROKEN or details == _LOCAL_FAILURE:
        hint = "; or it does not accept the certificate that is shown" if _CLOSED in details else ""
        return Unreachable(f"no coordinator answers at {address} ({details}{hint})")
    return ChoralError(f"the coordinator at {address} failed: {error.code().name}: {details}")


def reason_of(error: Any) -> str | None:
    """The name of the `ChoralError` behind a failed call; None: it does not say."""
    with suppress(DecodeError):
        for key, value in error.trailing_metadata() or ():
            if key != "grpc-status-details-bin":
                continue
            status = status_pb2.Status.FromString(value if isinstance(value, bytes) else value.encode())
            info = error_details_pb2.ErrorInfo()
            for detail in status.details:
                if detail.Unpack(info) and info.domain == DOMAIN:
                    return str(info.reason)
    return None
