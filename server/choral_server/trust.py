"""The coordinator's own certificate authority: enough for clients to know that they talk to their coordinator."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from choral.errors import TrustError
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA_CERTIFICATE, CA_KEY = "ca.pem", "ca.key"
SERVER_CERTIFICATE, SERVER_KEY = "server.pem", "server.key"
_CA_DAYS, _SERVER_DAYS = 3650, 825

Key = ec.EllipticCurvePrivateKey


def make_authority(folder: Path, hosts: Sequence[str]) -> None:
    """Write a new authority (ca.pem, ca.key) and a server certificate for `hosts` (server.pem, server.key) into `folder`.

    Keys are ECDSA P-256, because gRPC's BoringSSL refuses Ed25519 certificates; key files have mode 0600. Raises TrustError:
    one exists, or a host is neither a name nor an address.
    """
    existing = [name for name in (CA_CERTIFICATE, CA_KEY, SERVER_CERTIFICATE, SERVER_KEY) if (folder / name).exists()]
    if existing:
        raise TrustError(
            f"{folder / existing[0]} exists already: choose another folder, or remove it if no client trusts it any more"
        )
    ca_key, server_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = _authority(ca_key)
    server = _server(server_key, hosts, authority, ca_key)
    folder.mkdir(parents=True, exist_ok=True)
    _write_key(folder / CA_KEY, ca_key)
    _write_key(folder / SERVER_KEY, server_key)
    (folder / SERVER_CERTIFICATE).write_bytes(server.public_bytes(serialization.Encoding.PEM))
    (folder / CA_CERTIFICATE).write_bytes(authority.public_bytes(serialization.Encoding.PEM))


def _authority(key: Key) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Choral coordinator's own authority")])
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
    return (
        _builder(name, name, key, _CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )


def _server(key: Key, hosts: Sequence[str], authority: x509.Certificate, ca_key: Key) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Choral coordinator")])
    return (
        _builder(name, authority.subject, key, _SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(ca_key, hashes.SHA256())
    )


def _builder(subject: x509.Name, issuer: x509.Name, key: Key, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
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
