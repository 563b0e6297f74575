"""The head of a coordinator's history: its newest entry, signed. Whoever keeps one can tell later whether the entry stayed."""

from __future__ import annotations

import json
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from choral.canonical import canonical

DIGEST_BYTES, SIGNATURE_BYTES, KEY_BYTES = 32, 64, 32
_LARGEST = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Head:
    """The newest entry: its number, from 1, its SHA-256, the coordinator's Ed25519 signature of both, and the public key."""

    sequence: int
    digest: bytes
    signature: bytes
    key: bytes


def signed_part(sequence: int, digest: bytes) -> bytes:
    """What is signed (federation.proto, message Head)."""
    return b"choral history 1" + sequence.to_bytes(8, "big") + digest


def fault_of(head: Head) -> str | None:
    """What of a head is not as it must be, signature apart, if anything is."""
    if type(head.sequence) is not int or not 1 <= head.sequence <= _LARGEST:
        return f"entry {head.sequence!r}: entries are counted from 1"
    for what, value, length in (
        ("digest", head.digest, DIGEST_BYTES),
        ("signature", head.signature, SIGNATURE_BYTES),
        ("key", head.key, KEY_BYTES),
    ):
        if len(value) != length:
            return f"its {what} has {len(value)} bytes instead of {length}"
    return None


def is_genuine(head: Head) -> bool:
    """Whether the owner of the head's key has signed it."""
    if fault_of(head) is not None:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(head.key).verify(head.signature, signed_part(head.sequence, head.digest))
    except InvalidSignature:
        return False
    return True


def fingerprint(key: bytes) -> str:
    """As much of a public key as people compare."""
    return key.hex()[:16]


def to_line(head: Head) -> str:
    """A head as a line of JSON, as clients keep it."""
    parts = {"digest": head.digest.hex(), "signature": head.signature.hex(), "key": head.key.hex()}
    return canonical({"sequence": head.sequence, **parts}) + "\n"


def from_line(line: str) -> Head:
    """The head that was written. Raises ValueError: it is none."""
    try:
        content = json.loads(line)
        head = Head(content["sequence"], *(bytes.fromhex(content[name]) for name in ("digest", "signature", "key")))
        fault = fault_of(head)
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"no head of a history: {error}") from error
    if fault is not None:
        raise ValueError(fault)
    return head
