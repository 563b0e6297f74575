"""How people name a signing key, read it out to each other and write it down: its fingerprint, and the key itself."""

from __future__ import annotations

import hashlib
import re

KEY_BYTES = 32
_FINGERPRINT, _KEY = "sha256:", "ed25519:"


def fingerprint(key: bytes) -> str:
    """SHA-256 of a public Ed25519 key, 32 raw bytes, in 64 lowercase hexadecimal digits."""
    return hashlib.sha256(key).hexdigest()


def shown_fingerprint(key: bytes) -> str:
    """The same, marked as a fingerprint: a key has as many digits, and nobody can tell one from the other by looking."""
    return _FINGERPRINT + fingerprint(key)


def shown_key(key: bytes) -> str:
    """A public Ed25519 key as text, which `parse_key` reads."""
    return _KEY + key.hex()


def parse_fingerprint(text: str) -> str:
    """What `fingerprint` gives, from text with or without sha256: before it. Raises ValueError with the form that is expected."""
    if text.startswith(_KEY):
        raise ValueError("this is a key, not its fingerprint: give the line `fingerprint` of `choral client fingerprint`")
    digits = text.removeprefix(_FINGERPRINT).lower()
    if not _is_digits(digits):
        raise ValueError(
            "a fingerprint is 64 hexadecimal digits: copy what `choral client fingerprint` prints on that client's device"
        )
    return digits


def parse_key(text: str) -> bytes:
    """A public Ed25519 key, from text with or without ed25519: before it. Raises ValueError with the form that is expected."""
    if text.startswith(_FINGERPRINT):
        raise ValueError("this is a fingerprint, which does not hold the key: give the line `key` of `choral client fingerprint`")
    digits = text.removeprefix(_KEY)
    if not _is_digits(digits.lower()):
        raise ValueError(
            "a signing key is 64 hexadecimal digits: copy what `choral client fingerprint` prints on that client's device"
        )
    return bytes.fromhex(digits)


def _is_digits(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{64}", text) is not None
