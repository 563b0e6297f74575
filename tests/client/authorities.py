"""Authorities of signing keys, for tests of devices, which have no code that makes one."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from choral import voucher
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding


@dataclass(frozen=True)
class Authority:
    """With its certificate, PEM."""

    private: ec.EllipticCurvePrivateKey
    certificate: bytes

    @classmethod
    def made(cls, now: datetime | None = None) -> Authority:
        began = now or datetime.now(UTC)
        private = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "authority")])
        built = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(private.public_key())
        built = built.serial_number(1).not_valid_before(began - timedelta(days=1)).not_valid_after(began + timedelta(days=1))
        return cls(private, built.sign(private, hashes.SHA256()).public_bytes(Encoding.PEM))

    def vouch(self, name: str, key: bytes) -> bytes:
        return voucher.sign(self.private, name, key)
