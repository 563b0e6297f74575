"""The addresses that the coordinator listens on: for members, for those who want to be, and for whoever is on this machine."""

from __future__ import annotations

import asyncio
import getpass
import os
from collections.abc import Sequence
from pathlib import Path

import grpc
from choral.address import HostPort
from choral.errors import AddressError, ChoralError, TrustError
from choral.v1 import admin_pb2, admin_pb2_grpc, enrolment_pb2, enrolment_pb2_grpc, federation_pb2
from choral.wire import CHUNK_BYTES
from cryptography.hazmat.primitives.serialization import Encoding
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from choral_server.access import Gate, always, of_certificate
from choral_server.admin import AdminService
from choral_server.caller import Caller, Role
from choral_server.config import Limits, ServerConfig, Tls
from choral_server.enrolment_service import EnrolmentService
from choral_server.membership import Membership
from choral_server.service import FederationService, handler_of
from choral_server.trust import belong_together, certificate_in, key_in, signed_by

FEDERATION, ENROLMENT, ADMIN = (
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in ((federation_pb2, "Federation"), (enrolment_pb2, "Enrolment"), (admin_pb2, "Admin"))
)
_ENROLMENT_MESSAGE_BYTES = 16_384
_CLOSING_S = 1.0
Options = list[tuple[str, int]]


class Doors:
    """Opens and closes all of them."""

    def __init__(self, config: ServerConfig, membership: Membership, federation: FederationService, admin: AdminService) -> None:
        self._config = config
        self._membership = membership
        self._federation = federation
        self._admin = admin
        self._enrolment = EnrolmentService(membership)
        self._open: list[grpc.aio.Server] = []
        limits = config.limits
        if config.tls is None:
            self._gate = Gate(always(Caller(role=Role.DEVICE)), limits.first_message_s)
        else:
            self._gate = Gate(
                of_certificate(membership.identify), limits.first_message_s, limits.calls, limits.calls_per_s, membership.refused
            )

    async def open(self) -> HostPort:
        """Listen everywhere; the address for members. Raises AddressError or TrustError."""
        tls, enrolment = self._config.tls, self._config.enrolment_address
        if tls is not None and enrolment is not None:
            served = await self._open_enrolment(tls, enrolment)
            configured = self._config.enrolment
            self._membership.enrolment_port = (configured and configured.port) or served.port
        address = await self._open_federation(tls)
        await self._open_socket(self._config.admin_socket)
        return address

    def end_calls(self, name: str, error: ChoralError) -> None:
        """End everything that a member has open."""
        self._gate.end_calls(name, error)

    async def close(self) -> None:
        """Close all of them."""
        await asyncio.gather(*(server.stop(_CLOSING_S) for server in self._open))
        self._config.admin_socket.unlink(missing_ok=True)

    async def _open_federation(self, tls: Tls | None) -> HostPort:
        """For members: clients do their part here, and operators and viewers with a certificate what they may."""
        server = self._server([self._gate], _member_options(self._config.limits))
        server.add_generic_rpc_handlers((handler_of(self._federation),))
        if tls is None:
            await _describe(server, FEDERATION)
            return await self._listen(server, "listen", self._config.listen, None)
        enrolment_pb2_grpc.add_EnrolmentServicer_to_server(self._enrolment, server)
        admin_pb2_grpc.add_AdminServicer_to_server(self._admin, server)
        await _describe(server, FEDERATION, ENROLMENT, ADMIN)
        return await self._listen(server, "listen", self._config.listen, _credentials(tls, certified=True))

    async def _open_enrolment(self, tls: Tls, address: HostPort) -> HostPort:
        """For those who have a token: gRPC asks for certificates by port, and they have none yet."""
        limits = self._config.limits
        gate = Gate(always(Caller()), limits.first_message_s, limits.enrolment_connections, limits.enrolments_per_s)
        server = self._server([gate], _enrolment_options(limits))
        enrolment_pb2_grpc.add_EnrolmentServicer_to_server(self._enrolment, server)
        return await self._listen(server, "enrolment.listen", address, _credentials(tls, certified=False))

    async def _open_socket(self, socket: Path) -> None:
        """For operators on this machine: whoever can open the socket is one."""
        server = self._server([Gate(always(Caller(_user(), Role.OPERATOR)), self._config.limits.first_message_s)], [])
        admin_pb2_grpc.add_AdminServicer_to_server(self._admin, server)
        await _describe(server, ADMIN)
        socket.parent.chmod(0o700)
        socket.unlink(missing_ok=True)
        try:
            server.add_insecure_port(f"unix:{socket}")
        except RuntimeError as error:
            raise AddressError(
                f"state: {socket} cannot be listened on; use a folder with a path of less than 90 characters"
            ) from error
        await server.start()

    def _server(self, gates: Sequence[Gate], options: Options) -> grpc.aio.Server:
        server = grpc.aio.server(interceptors=gates, options=options)
        self._open.append(server)
        return server

    async def _listen(
        self, server: grpc.aio.Server, key: str, address: HostPort, credentials: grpc.ServerCredentials | None
    ) -> HostPort:
        try:
            if credentials is not None:
                port = server.add_secure_port(str(address), credentials)
            else:
                port = server.add_insecure_port(str(address))
        except RuntimeError as error:
            raise AddressError(
                f"{key}: {address} cannot be used: another process has the port, or the address is not this machine's; "
                "stop that process or give another address"
            ) from error
        await server.start()
        return HostPort(address.host, port)


def _user() -> str:
    """Who uses this machine; no member can have such a name."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a number without a name, as in some containers
        name = str(os.getuid())
    return f"{name}@{os.uname().nodename}"


def _member_options(limits: Limits) -> Options:
    return [
        *_common_options(limits),
        ("grpc.max_allowed_incoming_connections", limits.connections),
        ("grpc.max_receive_message_length", limits.message_bytes),
        ("grpc.http2.max_frame_size", CHUNK_BYTES),  # or a chunk would come in sixty-four frames
        ("grpc.max_connection_idle_ms", round(1000 * limits.idle_s)),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.bdp_probe", 0),  # with the next, bounds what is under way when a link breaks, and so has to be sent again
        ("grpc.http2.lookahead_bytes", 524_288),
        ("grpc.tsi.max_frame_size", 4096),  # each connection has a buffer of this size; larger frames were measured to be no faster
    ]


def _enrolment_options(limits: Limits) -> Options:
    """Whoever can reach the port may connect: little is taken in, and not for long."""
    handshake_ms = round(1000 * limits.handshake_s)
    return [
        *_common_options(limits),
        ("grpc.max_allowed_incoming_connections", limits.enrolment_connections),
        ("grpc.max_receive_message_length", _ENROLMENT_MESSAGE_BYTES),
        ("grpc.max_connection_idle_ms", handshake_ms),
        ("grpc.max_connection_age_ms", 4 * handshake_ms),
        ("grpc.max_connection_age_grace_ms", handshake_ms),
    ]


def _common_options(limits: Limits) -> Options:
    return [
        ("grpc.so_reuseport", 0),  # or a second coordinator would share the port in silence
        ("grpc.server_handshake_timeout_ms", round(1000 * limits.handshake_s)),
        ("grpc.max_metadata_size", limits.metadata_bytes),
        ("grpc.absolute_max_metadata_size", limits.metadata_bytes),
        ("grpc.max_concurrent_streams", limits.calls),
    ]


async def _describe(server: grpc.aio.Server, *services: str) -> None:
    """Offer health and reflection."""
    healthy = health.aio.HealthServicer()
    for name in ("", *services):
        await healthy.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    reflection.enable_server_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), server)


def _credentials(tls: Tls, certified: bool) -> grpc.ServerCredentials:
    """The coordinator's certificate, with its authority's for who knows only that; `certified`: ask for one in return."""
    own, key, ca = certificate_in(tls.certificate), key_in(tls.key), certificate_in(tls.ca)
    if not belong_together(own, key):
        raise TrustError(f"tls.key: {tls.key} is not the key of {tls.certificate}: give the two that belong together")
    if tls.ca_key is not None and not signed_by(own, ca):
        raise TrustError(
            f"tls.certificate: {tls.certificate} is not signed by {tls.ca}, by which those who enrol know this coordinator: "
            "make both with `choral server init`, or leave out tls.ca_key"
        )
    chain = tls.certificate.read_bytes()
    if tls.ca_key is not None:
        chain += ca.public_bytes(Encoding.PEM)
    pair = [(tls.key.read_bytes(), chain)]
    if not certified:
        return grpc.ssl_server_credentials(pair)
    return grpc.ssl_server_credentials(pair, tls.ca.read_bytes(), require_client_auth=True)
