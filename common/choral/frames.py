"""Chunks on the wire without needless copies: the protobuf encoding of a message that holds one, written and read by hand.

Protobuf itself copies the bytes of a chunk three times each way, which costs more than all else that is done with them. What is
written here is what protobuf would write; what does not look so when it is read, is left to protobuf.
"""

from __future__ import annotations

from dataclasses import dataclass

from google_crc32c import value as crc32c

_OFFSET, _DATA, _CRC, _CRC_BYTES = 0x08, 0x12, 0x1D, 4  # the tags of Chunk's fields
_MOST_VARINT_BYTES = 10


@dataclass(frozen=True, slots=True)
class Piece:
    """Some bytes of a whole, in which they begin at byte `offset`, and the CRC-32C that they should have."""

    offset: int
    data: bytes
    crc32: int


def piece_of(data: bytes, offset: int) -> Piece:
    """A piece with its checksum."""
    return Piece(offset, data, crc32c(data))


def frame(field: int, data: bytes, offset: int) -> bytes:
    """A message whose field number `field` is a chunk of these bytes."""
    begin = _tagged(_OFFSET, offset) if offset else b""
    begin += _tagged(_DATA, len(data)) if data else b""
    crc = crc32c(data)
    end = bytes((_CRC,)) + crc.to_bytes(_CRC_BYTES, "little") if crc else b""
    return b"".join((_tagged(_tag(field), len(begin) + len(data) + len(end)), begin, data, end))


def unframed(field: int, message: bytes) -> Piece | None:
    """The chunk in field number `field` of a message, if that is all that it holds, and it is written as `frame` does."""
    if not message or message[0] != _tag(field):
        return None
    length, at = _varint(message, 1)
    if length != len(message) - at:
        return None
    offset, size = 0, 0
    if message[at : at + 1] == bytes((_OFFSET,)):
        offset, at = _varint(message, at + 1)
    if message[at : at + 1] == bytes((_DATA,)):
        size, at = _varint(message, at + 1)
    end = at + size
    if len(message) != end + 1 + _CRC_BYTES or message[end] != _CRC or offset < 0 or size < 0:
        return None
    return Piece(offset, message[at:end], int.from_bytes(message[end + 1 :], "little"))


def _tag(field: int) -> int:
    """Of a field that holds a message."""
    return field << 3 | 2


def _tagged(tag: int, value: int) -> bytes:
    """A tag and a varint."""
    encoded = bytearray((tag,))
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The varint at byte `at`, and where it ends; -1 if there is none that fits a signed 64-bit number."""
    value = 0
    for place, byte in enumerate(message[at : at + _MOST_VARINT_BYTES - 1]):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, at + place + 1
    return -1, at
