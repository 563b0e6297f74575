"""An operator's connection to a coordinator: over the socket in its state folder, or from another machine with a certificate."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import grpc
from choral.errors import ChoralError, Unreachable
from choral.identity import Credentials, Identity, held, read_identity
from choral.status import from_rpc
from choral.v1 import admin_pb2, admin_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_LEFT = 1 / 3
_OPTIONS = [("grpc.max_receive_message_length", -1)]  # a hundred rounds of a thousand clients are some megabytes


class Operator:
    """Calls the Admin service at `address`, a socket in the file system if it has no `credentials`."""

    def __init__(self, address: str, credentials: Credentials | None = None, identity: Identity | None = None) -> None:
        self._address = address
        self._credentials = credentials
        self._identity = identity

    @classmethod
    def at(cls, where: Path) -> Self:
        """Of the coordinator with this configuration file, or where this identity is known. Raises ConfigError or TrustError."""
        if not where.is_dir():
            from choral_server.config import load

            return cls(str(load(where).admin_socket))
        known = held(where) or read_identity(where)
        return cls(str(known.server), known.credentials, known)

    @asynccontextmanager
    async def stub(self) -> AsyncIterator[admin_pb2_grpc.AdminAsyncStub]:
        """The service; what fails inside is raised as a ChoralError. Raises Unreachable: no coordinator is there."""
        await self._renew()
        async with self._channel() as channel:
            yield admin_pb2_grpc.AdminStub(channel)  # type: ignore[misc]

    async def _renew(self) -> None:
        """A person's certificate is renewed when it is used, once a third of its life is left."""
        known = self._identity
        if known is None or known.credentials.left > _LEFT or find_spec("choral_client") is None:
            return
        from choral_client.enrolment import renew

        with suppress(ChoralError, OSError):  # the present one is still good; if not, the call says so
            self._credentials = (await renew(known)).credentials

    async def token(self, name: str, role: str = "device") -> str:
        """A token with which somebody enrols."""
        async with self.stub() as admin:
            return (await admin.IssueToken(admin_pb2.IssueTokenRequest(name=name, role=role))).token

    async def health(self) -> None:
        """Return if the coordinator serves. Raises Unreachable."""
        async with self._channel() as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())  # type: ignore[attr-defined]
            if answer.status != health_pb2.HealthCheckResponse.SERVING:
                raise Unreachable(f"the coordinator at {self._address} says that it does not serve")

    @asynccontextmanager
    async def _channel(self) -> AsyncIterator[grpc.aio.Channel]:
        try:
            async with self._open() as channel:
                yield channel
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, self._address) from error

    def _open(self) -> grpc.aio.Channel:
        if (shown := self._credentials) is not None:
            credentials = grpc.ssl_channel_credentials(shown.ca, shown.key, shown.certificate)
            return grpc.aio.secure_channel(self._address, credentials, options=_OPTIONS)
        if not Path(self._address).exists():
            raise Unreachable(f"no coordinator runs with this configuration: {self._address} does not exist; start `choral server`")
        return grpc.aio.insecure_channel(f"unix:{self._address}", options=_OPTIONS)


def call(where: Path, method: str, **fields: Any) -> Any:
    """One unary call of the Admin service, with a request of these fields."""

    async def calling() -> Any:
        async with Operator.at(where).stub() as admin:
            return await getattr(admin, method)(getattr(admin_pb2, f"{method}Request")(**fields))

    return asyncio.run(calling())
