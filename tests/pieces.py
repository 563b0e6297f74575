"""Bytes as they travel: in chunks, each with its checksum."""

from __future__ import annotations

from choral.frames import Piece
from choral.v1 import model_pb2
from google_crc32c import value as crc32c


def pieces(content: bytes, begin: int = 0, size: int = 1 << 20) -> list[model_pb2.Chunk]:
    """The content from byte `begin` on, in good chunks."""
    return [piece(content[offset : offset + size], offset) for offset in range(begin, len(content), size)]


def piece(data: bytes, offset: int) -> model_pb2.Chunk:
    """A good chunk."""
    return model_pb2.Chunk(offset=offset, data=data, crc32=crc32c(data))


def taken(chunk: model_pb2.Chunk) -> Piece:
    """The same as what a side makes of it."""
    return Piece(chunk.offset, chunk.data, chunk.crc32)
