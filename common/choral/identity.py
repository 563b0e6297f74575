"""Who somebody is towards the coordinator: a private key, its certificate, and the authority to trust; in a folder, or given."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from choral.address import HostPort
from choral.durable import sync_folder
from choral.errors import TrustError
from choral.names import ALLOWED, is_name

FOLDER = "identity"
NEW, _OLD = f"{FOLDER}.new", f"{FOLDER}.old"
BACKDATED = timedelta(minutes=5)  # certificates begin so much before they are made: clocks differ
UNREADABLE = (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion)
"""what the readers of certificates, requests and keys raise, and of each what they read in it later, of bytes that are none"""
KEY, CERTIFICATE, SIGNING_KEY, AUTHORITY, ABOUT = "tls.key", "tls.pem", "signing.key", "ca.pem", "about.json"
VOUCHER = "signing.voucher"  # none in an identity from before there were vouchers, until its certificate is renewed


@dataclass(frozen=True, slots=True)
class Credentials:
    """What TLS needs, all PEM: the authority that must have signed the other side's certificate, and one's own, with its key."""

    ca: bytes
    certificate: bytes
    key: bytes = field(repr=False)

    @property
    def expires_at(self) -> datetime:
        """When the certificate expires."""
        return x509.load_pem_x509_certificate(self.certificate).not_valid_after_utc

    @property
    def left(self) -> float:
        """Which share of its life the certificate has left."""
        return (self.expires_at - datetime.now(UTC)).total_seconds() / self.lifetime_s

    @property
    def lifetime_s(self) -> float:
        """For how many seconds the certificate was made."""
        certificate = x509.load_pem_x509_certificate(self.certificate)
        return (certificate.not_valid_after_utc - certificate.not_valid_before_utc - BACKDATED).total_seconds()


@dataclass(frozen=True, slots=True)
class Identity:
    """A member's identity as enrolment left it in `folder`."""

    folder: Path
    name: str
    role: str
    server: HostPort
    credentials: Credentials


def read_identity(folder: Path) -> Identity:
    """The identity in a folder. Raises TrustError: there is none, it is damaged, or its certificate has expired."""
    try:
        about = json.loads((folder / ABOUT).read_bytes())
        name, role, server = str(about["name"]), str(about["role"]), HostPort.parse(about["server"])
        if not is_name(name):
            raise ValueError(f"{name[:80]!r} is no name; {ALLOWED}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TrustError(f"{folder / ABOUT} is damaged ({error}): enrol again with a new token") from error
    except OSError as error:
        raise TrustError(
            f"{folder}: no identity is there ({error.strerror}): enrol with a token, which `choral server token` prints"
        ) from error
    credentials = read_credentials(folder / AUTHORITY, folder / CERTIFICATE, folder / KEY)
    return Identity(folder, name, role, server, credentials)


def held(state: Path) -> Identity | None:
    """The identity in a state folder, if there is one; a newer one that an earlier process had got takes its place first.

    Raises TrustError: it cannot be used.
    """
    if (state / NEW / ABOUT).exists():
        with suppress(TrustError, OSError):
            read_identity(state / NEW)
            settle(state)
    return read_identity(state / FOLDER) if (state / FOLDER).exists() else None


def settle(state: Path) -> None:
    """Put the new identity in a state folder in the place of the old. Raises OSError."""
    fresh, place, old = state / NEW, state / FOLDER, state / _OLD
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    fresh.rename(place)
    sync_folder(state)
    shutil.rmtree(old, ignore_errors=True)


def read_credentials(ca: Path, certificate: Path, key: Path) -> Credentials:
    """Credentials from PEM files. Raises TrustError: one cannot be used, they do not belong together, or one has expired."""
    authority = certificates(ca)
    own, private = certificates(certificate), _key(key)
    read = Credentials(authority, own, private)
    try:
        belong = x509.load_pem_x509_certificate(own).public_key() == load_pem_private_key(private, None).public_key()
    except UNREADABLE as error:
        raise TrustError(f"{certificate} is for a key of an unknown kind ({error}): give the right file") from error
    if not belong:
        raise TrustError(f"{key} is not the key of {certificate}: give the two that belong together")
    if read.expires_at < datetime.now(UTC):
        raise TrustError(
            f"{certificate} has expired on {read.expires_at:%Y-%m-%d %H:%M} UTC: enrol again with a new token from the "
            "coordinator's operator, and look at this device's clock"
        )
    return read


def certificates(path: Path) -> bytes:
    """The content of a file with certificates. Raises TrustError."""
    content = _read(path)
    try:
        x509.load_pem_x509_certificates(content)
    except UNREADABLE as error:
        raise TrustError(f"{path} holds no certificate in PEM form: give the right file") from error
    return content


def _key(path: Path) -> bytes:
    content = _read(path)
    try:
        load_pem_private_key(content, None)
    except UNREADABLE as error:
        raise TrustError(f"{path} holds no private key in PEM form that opens without a password: give the right file") from error
    return content


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TrustError(f"{path} cannot be read ({error.strerror}): give a file that this user may read") from error
