"""A voucher: an authority's word that an Ed25519 key is the signing key of the client of that name.

What travels is the authority's signature alone, about 70 bytes; the name and the key stand beside it wherever it is shown. A file
has all three, so that nobody has to guess whose it is.

A voucher has no end of its own: it holds as long as the authority's certificate. One that expires would have to be renewed for
every device by an authority that may be a laptop in a drawer, and would protect from little: a coordinator that lies about who is
who needs a client's private key, and who has that is not stopped by a date. What it means: a device that gets new keys gets another
voucher, and its old key **stays vouched for**. An honest coordinator shuts the old device out (`choral clients revoke`, or its name
enrols anew); against one that is not, pin the new key in the guards of the others, or let the authority begin anew.

A voucher says nothing of a federation. An authority that serves two of them with the same names lets them be mixed up: give each
its own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from choral.canonical import canonical
from choral.errors import Deceived, TrustError
from choral.fingerprint import parse_key, shown_fingerprint
from choral.identity import UNREADABLE
from choral.names import is_name

LONGEST_BYTES = 4096
"""of the file: a signature by the longest RSA key that is used takes half of it"""
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Voucher:
    """A voucher with what it is for, as it stands in a file. `signature` is what travels."""

    name: str
    key: bytes
    signature: bytes

    def __str__(self) -> str:
        told = {"choral voucher": _FORMAT, "name": self.name, "key": self.key.hex(), "signature": self.signature.hex()}
        return canonical(told) + "\n"

    @classmethod
    def parse(cls, content: bytes, source: str) -> Self:
        """Read the content of a file, which `source` names. Raises TrustError: it holds no voucher; nothing is checked yet."""
        try:
            if len(content) > LONGEST_BYTES:
                raise ValueError(f"it is longer than {LONGEST_BYTES} bytes")
            told = json.loads(content)
            if told["choral voucher"] != _FORMAT:
                raise ValueError("it is of another release")
            made = cls(str(told["name"]), parse_key(told["key"]), bytes.fromhex(told["signature"]))
            if not is_name(made.name):
                raise ValueError("it is for a name that nobody may have")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise TrustError(f"{source} holds no voucher ({error}): `choral authority certify` makes one") from error
        return made


def statement(name: str, key: bytes) -> bytes:
    """What an authority signs. No certificate can be taken for it, whose bytes begin otherwise."""
    return canonical({"choral member": 1, "name": name, "key": key.hex()}).encode()


def sign(private: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, name: str, key: bytes) -> bytes:
    """The voucher of the authority with this key, for a client's signing key."""
    if isinstance(private, rsa.RSAPrivateKey):
        return private.sign(statement(name, key), padding.PKCS1v15(), hashes.SHA256())
    return private.sign(statement(name, key), ec.ECDSA(hashes.SHA256()))


def check(voucher: bytes, name: str, key: bytes, authorities: bytes, now: datetime) -> None:
    """Raises Deceived: none of the authorities (certificates, PEM) that are valid `now` says that the key is the client's."""
    told = f"the signing key of {name} ({shown_fingerprint(key)})"
    cure = "or ask its owner for the fingerprint, and pin it in this device's guard (clients)"
    if not voucher:
        raise Deceived(
            f"nobody certifies {told}: let {name} renew its certificate at a coordinator that enrols, or get a voucher with "
            f"`choral client voucher`; {cure}"
        )
    valid = [one for one in _certificates(authorities) if one.not_valid_before_utc <= now <= one.not_valid_after_utc]
    if not valid:
        raise Deceived(
            f"nobody can certify {told}: no certificate of the authority that this device trusts is valid on {now:%Y-%m-%d}: look "
            f"at this device's clock, give it the authority's new certificate, {cure}"
        )
    if not any(_has_signed(one, voucher, statement(name, key)) for one in valid):
        raise Deceived(
            f"{told} is not certified by an authority that this device trusts: its voucher is another authority's, or for another "
            f"name or key. Give {name} a voucher of the right authority, {cure}. If neither is wrong, somebody poses as {name}"
        )


def _certificates(authorities: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(authorities)
    except UNREADABLE as error:
        raise TrustError("the authority of signing keys is given by no certificate in PEM form: give the right file") from error


def _has_signed(authority: x509.Certificate, signature: bytes, said: bytes) -> bool:
    try:
        key: Any = authority.public_key()
        if isinstance(key, rsa.RSAPublicKey):
            key.verify(signature, said, padding.PKCS1v15(), hashes.SHA256())
        elif isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, said, ec.ECDSA(hashes.SHA256()))
        else:
            return False
    except (*UNREADABLE, InvalidSignature):
        return False
    return True
