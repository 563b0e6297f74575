"""The coordinator's own certificate authority: it vouches for the coordinator towards clients, and for clients towards it."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

from choral import voucher
from choral.durable import write_durably
from choral.errors import TrustError
from choral.identity import BACKDATED, UNREADABLE
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA_CERTIFICATE, CA_KEY = "ca.pem", "ca.key"
SERVER_CERTIFICATE, SERVER_KEY = "server.pem", "server.key"
_CA_DAYS, _SERVER_DAYS = 3650, 825

_RENEW_DAYS = 30.0

Key = ec.EllipticCurvePrivateKey


class Authority:
    """Signs the certificates of those who belong."""

    def __init__(self, certificate: x509.Certificate, key: Key) -> None:
        self.certificate = certificate
        self._key = key

    @classmethod
    def load(cls, certificate: Path, key: Path) -> Self:
        """From PEM files. Raises TrustError: one cannot be used, or they do not belong together."""
        own, private = certificate_in(certificate), key_in(key)
        if not belong_together(own, private):
            raise TrustError(f"tls.ca_key: {key} is not the key of {certificate}: give the two that belong together")
        return cls(own, private)

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the certificate, by which clients know it."""
        return self.certificate.fingerprint(hashes.SHA256())

    def certify(self, public_key: Key | Any, name: str, role: str, lifetime_s: float, now: datetime) -> x509.Certificate:
        """A client's certificate. It ends with the authority at the latest."""
        subject = x509.Name(
            [x509.NameAttribute(NameOID.COMMON_NAME, name), x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role)]
        )
        ends = min(now + timedelta(seconds=lifetime_s), self.certificate.not_valid_after_utc)
        return (
            _builder(subject, self.certificate.subject, public_key, now, ends)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .sign(self._key, hashes.SHA256())
        )

    def vouch(self, name: str, signing_key: bytes) -> bytes:
        """That an Ed25519 key is the signing key of the client of that name; `choral.voucher` says for how long."""
        return voucher.sign(self._key, name, signing_key)

    def renew_server(self, path: Path, key: Path, now: datetime) -> bool:
        """Replace the server's certificate, if it is ours and expires within a month; whether that was done. Raises TrustError."""
        old = certificate_in(path)
        if old.not_valid_after_utc - now > timedelta(days=_RENEW_DAYS):
            return False
        if not signed_by(old, self.certificate):
            raise TrustError(
                f"tls.certificate: {path} expires on {old.not_valid_after_utc:%Y-%m-%d}, and is not signed by tls.ca: replace it"
            )
        try:
            names = old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (*UNREADABLE, x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
            raise TrustError(f"tls.certificate: {path} names no host: make another with `choral server init`") from error
        new = _signed_server(key_in(key), names, self.certificate, self._key)
        try:
            write_durably(path, new.public_bytes(serialization.Encoding.PEM))
        except OSError as error:
            raise TrustError(
                f"tls.certificate: {path} expires on {old.not_valid_after_utc:%Y-%m-%d} and cannot be replaced ({error.strerror}): "
                "let this user write it"
            ) from error
        return True


def signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether this authority has."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (*UNREADABLE, InvalidSignature):
        return False
    return True


def certificate_in(path: Path) -> x509.Certificate:
    """The first certificate in a PEM file. Raises TrustError."""
    try:
        return x509.load_pem_x509_certificates(_content(path))[0]
    except (*UNREADABLE, IndexError) as error:
        raise TrustError(f"tls: {path} holds no certificate in PEM form: give the right file") from error


def key_in(path: Path) -> Key:
    """The private key in a PEM file. Raises TrustError: it is none, or of a kind that clients' TLS refuses."""
    try:
        key = serialization.load_pem_private_key(_content(path), None)
    except UNREADABLE as error:
        raise TrustError(
            f"tls: {path} holds no private key in PEM form that opens without a password: give the right file"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise TrustError(f"tls: {path} holds a key that gRPC's TLS cannot use: make an ECDSA P-256 or RSA key")
    return key  # type: ignore[return-value]


def belong_together(certificate: x509.Certificate, key: Key) -> bool:
    """Whether the certificate is for this key; one for a key that cannot be read is for none."""
    try:
        return certificate.public_key() == key.public_key()
    except UNREADABLE:
        return False


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TrustError(f"tls: {path} cannot be read ({error.strerror}): `choral server init` makes it") from error


def make_authority(folder: Path, hosts: Sequence[str]) -> None:
    """Write a new authority (ca.pem, ca.key) and a server certificate for `hosts` (server.pem, server.key) into `folder`.

    Keys are ECDSA P-256, because gRPC's BoringSSL refuses Ed25519 certificates; key files have mode 0600. Raises TrustError:
    one exists, or a host is neither a name nor an address.
    """
    _must_be_free(folder, CA_CERTIFICATE, CA_KEY, SERVER_CERTIFICATE, SERVER_KEY)
    ca_key, server_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = _authority(ca_key, "Choral coordinator's own authority")
    names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
    server = _signed_server(server_key, names, authority, ca_key)
    folder.mkdir(parents=True, exist_ok=True)
    _write_key(folder / CA_KEY, ca_key)
    _write_key(folder / SERVER_KEY, server_key)
    (folder / SERVER_CERTIFICATE).write_bytes(server.public_bytes(serialization.Encoding.PEM))
    (folder / CA_CERTIFICATE).write_bytes(authority.public_bytes(serialization.Encoding.PEM))


def make_voucher_authority(folder: Path) -> None:
    """Write a new authority (ca.pem, ca.key) that only certifies signing keys into `folder`. Raises TrustError: one is there."""
    _must_be_free(folder, CA_CERTIFICATE, CA_KEY)
    key = ec.generate_private_key(ec.SECP256R1())
    folder.mkdir(parents=True, exist_ok=True)
    _write_key(folder / CA_KEY, key)
    certificate = _authority(key, "Choral authority of signing keys")
    (folder / CA_CERTIFICATE).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def _must_be_free(folder: Path, *names: str) -> None:
    existing = [name for name in names if (folder / name).exists()]
    if existing:
        raise TrustError(
            f"{folder / existing[0]} exists already: choose another folder, or remove it if no client trusts it any more"
        )


def _authority(key: Key, called: str) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, called)])
    usage = x509.KeyUsage(
        key_cert_sign=True,
        crl_sign=True,
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    now = datetime.now(UTC)
    return (
        _builder(name, name, key.public_key(), now, now + timedelta(days=_CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )


def _signed_server(key: Key, names: x509.SubjectAlternativeName, authority: x509.Certificate, ca_key: Key) -> x509.Certificate:
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Choral coordinator")]), datetime.now(UTC)
    ends = min(now + timedelta(days=_SERVER_DAYS), authority.not_valid_after_utc)
    return (
        _builder(name, authority.subject, key.public_key(), now, ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(names, critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(ca_key, hashes.SHA256())
    )


def _builder(subject: x509.Name, issuer: x509.Name, public_key: Any, begins: datetime, ends: datetime) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins - BACKDATED)
        .not_valid_after(ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9])?", host):
        raise TrustError(f"host {host!r} is neither an IP address nor a DNS name: give names as clients will write them")
    return x509.DNSName(host)


def _write_key(path: Path, key: Key) -> None:
    content = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
