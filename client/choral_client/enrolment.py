"""How a device comes to belong: keys made here, which never leave, and a certificate for them from the coordinator."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import ssl
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import structlog
from choral import identity, voucher
from choral.address import HostPort
from choral.durable import sync_folder, write_durably
from choral.errors import ConfigError, Deceived, TrustError, Unreachable
from choral.identity import Credentials, Identity, held, read_credentials, read_identity
from choral.status import from_rpc
from choral.token import PROOF, Token
from choral.v1 import enrolment_pb2 as pb
from choral.v1 import enrolment_pb2_grpc
from choral.voucher import Voucher
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from choral_client.keys import make_key, private_key

log = structlog.get_logger()
_CALL_S = 20.0


async def enrol(token: Token, server: HostPort, state: Path) -> Identity:
    """Enrol with a token at the coordinator whose clients' port is `server`; the identity is then in `state`, in place of an older.

    What was begun and got no answer goes on with the same keys. Raises TrustError: the coordinator is not the token's, or a file
    cannot be written; ConfigError: `state` is another member's; Unreachable; TokenRefused.
    """
    with suppress(TrustError):  # one that cannot be used is in nobody's way
        if (other := held(state)) is not None and other.name != token.name:
            raise ConfigError(
                f"{state} holds the identity of {other.name}, and the token is for {token.name}: give another --state"
            )
    fresh = state / identity.NEW
    _make_keys(fresh)
    ca = await asyncio.to_thread(_authority, HostPort(server.host, token.port), token.authority)
    address = str(HostPort(server.host, token.port))
    request = _signing_request(private_key(fresh / identity.KEY), token.name)
    signing = private_key(fresh / identity.SIGNING_KEY)
    asked = pb.EnrolRequest(
        secret=token.secret,
        signing_request=request,
        signing_key=signing.public_key().public_bytes_raw(),
        signature=signing.sign(PROOF + request),
    )
    async with grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ca)) as channel:
        try:
            answer = await enrolment_pb2_grpc.EnrolmentStub(channel).Enrol(asked, timeout=_CALL_S)  # type: ignore[misc]
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, address) from error
    return _settled(state, token.name, server, ca, answer)


def _settled(state: Path, name: str, server: HostPort, ca: bytes, answer: pb.EnrolResponse) -> Identity:
    """Keep what the coordinator answered. Raises TrustError: it cannot be used, and takes no place."""
    if answer.name != name:
        raise TrustError(f"the coordinator enrolled {answer.name[:80]!r}, and the token is for {name}: look at both releases")
    fresh = state / identity.NEW
    about = {"name": answer.name, "role": answer.role, "server": str(server)}
    try:
        write_durably(fresh / identity.AUTHORITY, ca)
        write_durably(fresh / identity.CERTIFICATE, _pem(answer.certificate))
        _keep_voucher(fresh, name, ca, answer.voucher)
        write_durably(fresh / identity.ABOUT, json.dumps(about).encode())
        read_identity(fresh)
        identity.settle(state)
    except OSError as error:
        raise TrustError(f"{fresh} cannot be written ({error.strerror}): make room, and enrol again with the same token") from error
    return read_identity(state / identity.FOLDER)


async def renew(known: Identity) -> Identity:
    """A new certificate for the same key, kept in the identity's folder. Raises Unreachable or a Refused."""
    address = str(known.server)
    request = _signing_request(private_key(known.folder / identity.KEY), known.name)
    async with grpc.aio.secure_channel(address, tls(known.credentials)) as channel:
        try:
            stub: Any = enrolment_pb2_grpc.EnrolmentStub(channel)
            answer = await stub.Renew(pb.RenewRequest(signing_request=request), timeout=_CALL_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, address) from error
    return _renewed(known, answer)


def _renewed(known: Identity, answer: pb.RenewResponse) -> Identity:
    """Keep the certificate that the coordinator answered. Raises TrustError: it cannot be used, and the old one stays."""
    place, fresh = known.folder / identity.CERTIFICATE, known.folder / f".{identity.CERTIFICATE}.new"
    write_durably(fresh, _pem(answer.certificate))
    try:
        read_credentials(known.folder / identity.AUTHORITY, fresh, known.folder / identity.KEY)
        _keep_voucher(known.folder, known.name, known.credentials.ca, answer.voucher)
        fresh.replace(place)
    finally:
        fresh.unlink(missing_ok=True)
    sync_folder(known.folder)
    return read_identity(known.folder)


def _keep_voucher(folder: Path, name: str, ca: bytes, answered: bytes) -> None:
    """Keep what certifies this device's signing key; an older coordinator answers none. Raises TrustError: it certifies another."""
    if not answered:
        return
    key = private_key(folder / identity.SIGNING_KEY).public_key().public_bytes_raw()
    try:
        voucher.check(answered, name, key, ca, datetime.now(UTC))
    except Deceived as error:
        raise TrustError(f"the coordinator answered with a voucher that nobody would accept: {error}") from error
    write_durably(folder / identity.VOUCHER, str(Voucher(name, key, answered)).encode())


def tls(credentials: Credentials) -> grpc.ChannelCredentials:
    """As gRPC takes them."""
    return grpc.ssl_channel_credentials(credentials.ca, credentials.key, credentials.certificate)


def _make_keys(folder: Path) -> None:
    """The two private keys in `folder`, unless an attempt before has made them: ECDSA P-256 for TLS, Ed25519 to sign."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, generate in (
            (identity.KEY, lambda: ec.generate_private_key(ec.SECP256R1())),
            (identity.SIGNING_KEY, lambda: _signing_key(folder.parent)),
        ):
            with suppress(FileExistsError):
                make_key(folder / name, generate())
    except OSError as error:
        raise TrustError(f"{folder} cannot be used ({error.strerror}): give a --state that this user may write") from error


def _signing_key(state: Path) -> ed25519.Ed25519PrivateKey:
    """That which the device has, for others may have pinned it, or an authority elsewhere certified it; else a new one."""
    for folder in (state / identity.FOLDER, state):
        with suppress(TrustError):  # one that cannot be used is in nobody's way
            if isinstance(known := private_key(folder / identity.SIGNING_KEY), ed25519.Ed25519PrivateKey):
                return known
    return ed25519.Ed25519PrivateKey.generate()


def _signing_request(key: ec.EllipticCurvePrivateKey, name: str) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def _pem(certificate: bytes) -> bytes:
    try:
        return x509.load_der_x509_certificate(certificate).public_bytes(Encoding.PEM)
    except identity.UNREADABLE as error:
        raise TrustError("the coordinator answered with something that is no certificate: look at both releases") from error


def _authority(address: HostPort, fingerprint: bytes) -> bytes:
    """The certificate (PEM) of the authority that the token names, from the chain that the coordinator shows.

    Nothing is trusted yet: what is shown counts only if its SHA-256 is `fingerprint`. The connection over which the secret goes
    is another, and verified. Raises Unreachable or TrustError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((address.host, address.port), timeout=_CALL_S) as plain,
            context.wrap_socket(plain, server_hostname=address.host) as link,
        ):
            shown = _chain(link)
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionResetError) as error:
        raise Unreachable(
            f"{address} has closed the connection: too many may want to enrol at once, or it is no coordinator"
        ) from error
    except ssl.SSLError as error:
        raise TrustError(f"what answers at {address} does not speak TLS ({error.reason}): is it a Choral coordinator?") from error
    except OSError as error:
        raise Unreachable(f"nobody enrols clients at {address} ({error.strerror or error}): is the coordinator running?") from error
    for certificate in shown:
        if hashlib.sha256(certificate).digest() == fingerprint:
            return ssl.DER_cert_to_PEM_cert(certificate).encode()
    raise TrustError(
        f"the coordinator at {address} is not the one that made the token: its authority has another fingerprint. "
        "Check --server; if it is right, somebody is between you and the coordinator"
    )


def _chain(link: ssl.SSLSocket) -> list[bytes]:
    """The certificates (DER) as shown. Public since Python 3.13."""
    if hasattr(link, "get_unverified_chain"):
        return list(link.get_unverified_chain())
    shown = link._sslobj.get_unverified_chain() or []  # type: ignore[attr-defined]
    return [ssl.PEM_cert_to_DER_cert(certificate.public_bytes()) for certificate in shown]
