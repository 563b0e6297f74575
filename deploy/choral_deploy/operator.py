"""An operator's connection to a coordinator, over the socket in its state folder."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
from choral.errors import Unreachable
from choral.status import from_rpc
from choral.v1 import admin_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_OPTIONS = [("grpc.max_receive_message_length", -1)]  # a hundred rounds of a thousand clients are some megabytes


class Operator:
    """Calls the Admin service behind `socket`."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    @asynccontextmanager
    async def stub(self) -> AsyncIterator[admin_pb2_grpc.AdminAsyncStub]:
        """The service; what fails inside is raised as a ChoralError. Raises Unreachable: no coordinator is there."""
        async with self._channel() as channel:
            yield admin_pb2_grpc.AdminStub(channel)  # type: ignore[misc]

    async def health(self) -> None:
        """Return if the coordinator serves. Raises Unreachable."""
        async with self._channel() as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())  # type: ignore[attr-defined]
            if answer.status != health_pb2.HealthCheckResponse.SERVING:
                raise Unreachable(f"the coordinator behind {self._socket} says that it does not serve")

    @asynccontextmanager
    async def _channel(self) -> AsyncIterator[grpc.aio.Channel]:
        if not self._socket.exists():
            raise Unreachable(f"no coordinator runs with this configuration: {self._socket} does not exist; start `choral server`")
        try:
            async with grpc.aio.insecure_channel(f"unix:{self._socket}", options=_OPTIONS) as channel:
                yield channel
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, str(self._socket)) from error
