"""A version's file in fewer bytes: forms in which it can be fetched, and what makes the file of them again. Nothing is held whole.

A version is a safetensors file: the length of its header (8 bytes, little-endian), the header, and the tensors' bytes. In each form
the length and the header stand first, as they are.

    bf16     then the tensors in their order; float32 tensors that are averaged are rounded to bfloat16, 2 bytes an element. What is
             made of it is the same file with rounded values: not the version, but as good to train from
    delta    then the difference to the tensors of the version before, in blocks of 2^18 words of 4 bytes, each behind its
             length: the difference of two words as integers, its sign in the lowest bit, by significance through Zstandard, for
             floating-point numbers that are close are close as integers. What is made of it, with that version at hand, is the
             version to the bit
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from choral.codecs import BLOCK, compressed, decompressed, from_bf16, to_bf16
from choral.errors import InvalidMessage
from choral.manifest import Manifest

BF16, DELTA = "bf16", "delta"
_HEADER = struct.Struct("<Q")
_LENGTH = struct.Struct("<I")
_LONGEST_HEADER_BYTES = 1 << 26
_PIECE_BYTES = 4 * BLOCK


@dataclass(frozen=True, slots=True)
class _Layout:
    """A safetensors file's header, as it lies, and its tensors in order: name, whether it is float32, and length in bytes."""

    header: bytes
    tensors: tuple[tuple[str, bool, int], ...]

    @property
    def data_bytes(self) -> int:
        return sum(length for _, _, length in self.tensors)


def rounded_names(manifest: Manifest) -> frozenset[str]:
    """The tensors that are rounded in the form bf16. Statistics are not: a mean far from zero would lose all that matters of it."""
    return frozenset(entry.name for entry in manifest.averaged if entry.dtype == "F32")


def halved(version: BinaryIO, names: AbstractSet[str]) -> Iterator[bytes]:
    """The form bf16 of a version's file, in which the tensors in `names` are rounded. Raises InvalidMessage: it is no version."""
    layout = _layout(version)
    yield layout.header
    for name, is_float32, length in layout.tensors:
        for piece in _pieces(version, length):
            rounds = is_float32 and name in names
            yield to_bf16(np.frombuffer(piece, "<f4").astype(np.float32, copy=False)).tobytes() if rounds else piece


def restored(form: BinaryIO, names: AbstractSet[str]) -> Iterator[bytes]:
    """The file of rounded values from the form bf16. Raises InvalidMessage: it is none."""
    layout = _layout(form)
    yield layout.header
    for name, is_float32, length in layout.tensors:
        rounds = is_float32 and name in names
        for piece in _pieces(form, length // 2 if rounds else length):
            yield from_bf16(np.frombuffer(piece, "<u2")).astype("<f4", copy=False).tobytes() if rounds else piece
    _must_end(form)


def difference(version: BinaryIO, base: BinaryIO) -> Iterator[bytes]:
    """The form delta of a version's file, to one of as many bytes of tensors. Raises InvalidMessage: it is not."""
    layout, before = _layout(version), _layout(base)
    if layout.data_bytes != before.data_bytes:
        raise InvalidMessage(
            f"{layout.data_bytes} bytes of tensors, and {before.data_bytes} in the version before: fetch the whole"
        )
    yield layout.header
    for piece, old in zip(_pieces(version, layout.data_bytes), _pieces(base, layout.data_bytes), strict=True):
        words = _words(piece) - _words(old)
        signed = words.view(np.int32)
        frame = compressed((signed << 1 ^ signed >> 31).view(np.uint8), 4)
        yield _LENGTH.pack(len(frame)) + frame


def patched(form: BinaryIO, base: BinaryIO) -> Iterator[bytes]:
    """The version's file from the form delta and the file that it is the difference to. Raises InvalidMessage: it is none."""
    layout, before = _layout(form), _layout(base)
    if layout.data_bytes != before.data_bytes:
        raise InvalidMessage(f"{layout.data_bytes} bytes of tensors, and {before.data_bytes} in the version that is here")
    yield layout.header
    for old in _pieces(base, layout.data_bytes):
        prefix = form.read(_LENGTH.size)
        length = _LENGTH.unpack(prefix)[0] if len(prefix) == _LENGTH.size else 0
        if not 0 < length <= 2 * _PIECE_BYTES:
            raise InvalidMessage(f"a block of {length} bytes in a delta")
        padded = _words(old)
        content = decompressed(form.read(length), 4 * padded.size, 4, exactly=True)
        told = np.frombuffer(content, "<u4")
        words = padded + (told >> 1 ^ np.uint32(0) - (told & 1))
        yield words.astype("<u4", copy=False).tobytes()[: len(old)]
    _must_end(form)


def _layout(file: BinaryIO) -> _Layout:
    """Read up to the tensors. Raises InvalidMessage: it does not begin like a safetensors file, or its tensors leave gaps."""
    start = file.read(_HEADER.size)
    length = _HEADER.unpack(start)[0] if len(start) == _HEADER.size else 0
    if not 0 < length <= _LONGEST_HEADER_BYTES:
        raise InvalidMessage(f"a safetensors header of {length} bytes")
    header = file.read(length)
    tensors, end = [], 0
    try:
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            begin, until = entry["data_offsets"]
            if type(begin) is not int or type(until) is not int or begin != end or until < begin:
                raise ValueError(f"tensor {name[:80]!r} does not begin where the last one ends")
            is_float32 = entry["dtype"] == "F32"
            if is_float32 and (until - begin) % 4:
                raise ValueError(f"tensor {name[:80]!r} is no float32")
            tensors.append((name, is_float32, until - begin))
            end = until
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidMessage(f"a safetensors header that is none ({str(error)[:120]})") from error
    return _Layout(start + header, tuple(tensors))


def _pieces(file: BinaryIO, length: int) -> Iterator[bytes]:
    """The next `length` bytes. Raises InvalidMessage: the file ends before."""
    while length:
        piece = file.read(min(length, _PIECE_BYTES))
        if len(piece) != min(length, _PIECE_BYTES):
            raise InvalidMessage(f"a file of tensors that ends {length - len(piece)} bytes early")
        yield piece
        length -= len(piece)


def _words(piece: bytes) -> NDArray[np.uint32]:
    """As little-endian words, zeros behind the last byte."""
    return np.frombuffer(piece + bytes(-len(piece) % 4), "<u4").astype(np.uint32, copy=False)


def _must_end(file: BinaryIO) -> None:
    if file.read(1):
        raise InvalidMessage("a file of tensors that goes on behind the last one")
