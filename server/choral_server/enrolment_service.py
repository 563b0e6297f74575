"""The Enrolment servicer: translate and call. No decisions."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import grpc
import structlog
from choral.errors import ChoralError
from choral.status import abort
from choral.v1 import enrolment_pb2 as pb
from choral.v1 import enrolment_pb2_grpc
from cryptography.hazmat.primitives.serialization import Encoding

from choral_server.caller import CALLER
from choral_server.membership import Membership

log = structlog.get_logger()
Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")


class EnrolmentService(enrolment_pb2_grpc.EnrolmentServicer):
    """What those reach who want to belong, and go on belonging."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._told_at = -math.inf

    async def Enrol(self, request: pb.EnrolRequest, context: Context) -> pb.EnrolResponse:
        """Turn a token into a certificate."""
        try:
            asked = request.secret, request.signing_request, request.signing_key, request.signature
            certificate, member = await _whole(self._membership.enrol(*asked))
        except ChoralError as error:
            if (now := time.monotonic()) - self._told_at > 1:  # the log is not for strangers to fill
                self._told_at = now
                log.warning("enrolment refused", address=context.peer(), reason=str(error))
            await abort(context, error)
        return pb.EnrolResponse(
            certificate=certificate.public_bytes(Encoding.DER),
            name=member.name,
            role=member.role.value,
            voucher=self._membership.voucher(member),
        )

    async def Renew(self, request: pb.RenewRequest, context: Context) -> pb.RenewResponse:
        """The caller's next certificate."""
        try:
            certificate, member = await _whole(self._membership.renew(CALLER.get(), request.signing_request))
        except ChoralError as error:
            log.warning("renewal refused", client=CALLER.get().name, reason=str(error))
            await abort(context, error)
        return pb.RenewResponse(certificate=certificate.public_bytes(Encoding.DER), voucher=self._membership.voucher(member))


async def _whole(doing: Coroutine[Any, Any, T]) -> T:
    """The result of what is done to its end, also if who asked has gone."""
    task = asyncio.ensure_future(doing)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to hear of a failure
    return await asyncio.shield(task)
