"""Written and read by hand, a chunk is what protobuf makes of it."""

from __future__ import annotations

import pytest
from choral.frames import Piece, frame, unframed
from choral.v1 import federation_pb2 as pb
from choral.v1 import model_pb2 as mb
from hypothesis import example, given
from hypothesis import strategies as st
from pieces import piece

OFFSETS = st.integers(0, 2**63 - 1)
DOWNLOAD, UPLOAD = 1, 2


def encoded(field: int, chunk: mb.Chunk) -> bytes:
    message = pb.DownloadResponse(chunk=chunk) if field == DOWNLOAD else pb.UploadRequest(chunk=chunk)
    return message.SerializeToString(deterministic=True)


@given(st.sampled_from([DOWNLOAD, UPLOAD]), st.binary(max_size=300), OFFSETS)
@example(DOWNLOAD, b"", 0)
@example(UPLOAD, bytes(127), 127)
@example(UPLOAD, bytes(128), 128)
@example(DOWNLOAD, bytes(1 << 20), 2**40)
def test_a_frame_is_what_protobuf_writes(field: int, data: bytes, offset: int) -> None:
    assert frame(field, data, offset) == encoded(field, piece(data, offset))


@given(st.sampled_from([DOWNLOAD, UPLOAD]), st.binary(min_size=1, max_size=300), OFFSETS)
def test_what_protobuf_writes_is_read(field: int, data: bytes, offset: int) -> None:
    chunk = piece(data, offset)
    expected = Piece(offset, data, chunk.crc32) if chunk.crc32 else None  # a zero is not written: protobuf reads that
    assert unframed(field, encoded(field, chunk)) == expected


@given(st.sampled_from([DOWNLOAD, UPLOAD]), st.binary(max_size=60))
def test_of_other_bytes_nothing_is_made_that_protobuf_does_not_read(field: int, message: bytes) -> None:
    found = unframed(field, message)
    if found is not None:
        kind = pb.DownloadResponse if field == DOWNLOAD else pb.UploadRequest
        chunk = kind.FromString(message).chunk
        assert (chunk.offset, chunk.data, chunk.crc32) == (found.offset, found.data, found.crc32)


@given(st.binary(min_size=1, max_size=40), st.integers(0, 2**40), st.data())
def test_a_frame_with_changed_bytes_is_read_as_by_protobuf_or_not_at_all(data: bytes, offset: int, drawn: st.DataObject) -> None:
    message = bytearray(frame(UPLOAD, data, offset))
    for _ in range(drawn.draw(st.integers(1, 3))):
        message[drawn.draw(st.integers(0, len(message) - 1))] = drawn.draw(st.integers(0, 255))
    found = unframed(UPLOAD, bytes(message))
    if found is not None:
        chunk = pb.UploadRequest.FromString(bytes(message)).chunk
        assert (chunk.offset, chunk.data, chunk.crc32) == (found.offset, found.data, found.crc32)


@pytest.mark.parametrize("message", [b"", b"\x0a", b"\x0a\x80", b"\x0a\x05\x1d", b"\x12\x05\x1d\x00\x00\x00\x00"])
def test_what_ends_too_early_or_is_something_else_is_none(message: bytes) -> None:
    assert unframed(DOWNLOAD, message) is None
