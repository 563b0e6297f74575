"""The one-time token with which a device or an operator enrols, as one line of text."""

from __future__ import annotations

import base64
import binascii
import hashlib
import secrets
import struct
import zlib
from dataclasses import dataclass, field
from typing import Self

from choral.errors import TrustError
from choral.names import is_name

SECRET_BYTES = 24
PROOF = b"choral enrolment 1"
"""what a device signs with its signing key when it enrols, before the signing request"""
LONGEST = 1024  # characters
_MARK = "choral-"
_FORMAT = 1
_HEAD = struct.Struct(f">BH32s{SECRET_BYTES}s")  # format, port, fingerprint, secret; then the name and a CRC-32 of all that
_DAMAGED = "the enrolment token is damaged: copy the whole line, without spaces"
_DIGEST = struct.Struct(">I")


@dataclass(frozen=True, slots=True)
class Token:
    """Lets its bearer enrol once as `name`.

    `authority` is the SHA-256 of the certificate (DER) of the authority that must have signed the coordinator's certificate, `port`
    where the coordinator serves enrolment. `str` gives the line to be handed over; the secret shows nowhere else.
    """

    name: str
    port: int
    authority: bytes
    secret: bytes = field(repr=False, default_factory=lambda: secrets.token_bytes(SECRET_BYTES))

    def __str__(self) -> str:
        content = _HEAD.pack(_FORMAT, self.port, self.authority, self.secret) + self.name.encode()
        return _MARK + base64.urlsafe_b64encode(content + _DIGEST.pack(zlib.crc32(content))).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the line. Raises TrustError: it is no token, or not all of it; the message does not repeat it."""
        text = text.strip()
        if not text.startswith(_MARK) or len(text) > LONGEST:
            raise TrustError("this is no enrolment token: it is one line, begins with choral-, and `choral server token` prints it")
        encoded = text.removeprefix(_MARK)
        try:
            raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
            content, (digest,) = raw[: -_DIGEST.size], _DIGEST.unpack(raw[-_DIGEST.size :])
            if zlib.crc32(content) != digest:
                raise ValueError("checksum")
            form, port, authority, secret = _HEAD.unpack(content[: _HEAD.size])
            name = content[_HEAD.size :].decode()
        except (binascii.Error, struct.error, ValueError):
            raise TrustError(_DAMAGED) from None
        if form != _FORMAT:
            raise TrustError("the enrolment token is of another release: install the coordinator's release of Choral")
        if not is_name(name):
            raise TrustError("the enrolment token is for a name that nobody may have: ask for a new one")
        token = cls(name, port, authority, secret)
        if str(token) != text:  # the last character has bits that nothing reads
            raise TrustError(_DAMAGED)
        return token


def digest_of(secret: bytes) -> str:
    """What the coordinator keeps of a token. The secret has 192 random bits, so that a plain hash tells nothing of it."""
    return hashlib.sha256(b"choral token 1" + secret).hexdigest()
