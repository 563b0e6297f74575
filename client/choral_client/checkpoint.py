"""What a checkpoint may be on this device: a safetensors file of the installed model's tensors, whatever the coordinator sends.

It is read by hand and not by the safetensors library, to which each tensor costs a copy in memory: here a model's bytes go from the
file to where the model has them, and to the update, a block at a time.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedIOBase
from typing import Any

import torch
from choral.errors import Declined
from choral.flat import DTYPES
from choral.manifest import Entry, Manifest
from choral.wire import brief
from torch import Tensor

_LENGTH = struct.Struct("<Q")
_HEADER_BYTES = 1 << 20  # room for the file's own header,
_ENTRY_BYTES = 1 << 10  # which tells this much of each tensor
_TYPES = {name: dtype for dtype, name in DTYPES.items()}
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's bytes lie in a file: little-endian, in row-major order, from byte `begin` on."""

    entry: Entry
    begin: int

    @property
    def dtype(self) -> torch.dtype:
        """Its type."""
        return _TYPES[self.entry.dtype]

    def read_into(self, file: BufferedIOBase, tensor: Tensor) -> None:
        """Fill a contiguous tensor of its type and size."""
        _read_exactly(file, self.begin, _bytes_of(tensor))

    def block(self, file: BufferedIOBase, start: int, stop: int) -> Tensor:
        """A new tensor `(stop - start,)` with some of its elements, counted in row-major order."""
        block = torch.empty(stop - start, dtype=self.dtype)
        _read_exactly(file, self.begin + start * self.dtype.itemsize, _bytes_of(block))
        return block


class Expected:
    """What is expected of each checkpoint: the tensors in `manifest`, no more and no others."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._told = {entry.name: f"{entry.dtype} {list(entry.shape)}" for entry in manifest.entries}
        self._tensor_bytes = sum(entry.size * _TYPES[entry.dtype].itemsize for entry in manifest.entries)
        self._most_header_bytes = _HEADER_BYTES + _ENTRY_BYTES * len(manifest.entries)

    @property
    def largest_bytes(self) -> int:
        """Length of the longest file that can be one."""
        return self._tensor_bytes + self._most_header_bytes

    def places(self, file: BufferedIOBase) -> dict[str, Place]:
        """Where the tensors lie in a file, by name. Raises Declined: it is no safetensors file, or of another model."""
        try:
            tensors, begin, size = self._header(file)
        except (ValueError, RecursionError) as error:  # of JSON and of Unicode as well
            raise _not_safetensors(str(error)) from error
        self._compare({name: _told(about) for name, about in tensors.items()})
        return {entry.name: Place(entry, begin + _offset(tensors[entry.name], entry, size)) for entry in self.manifest.entries}

    def _header(self, file: BufferedIOBase) -> tuple[dict[str, Any], int, int]:
        """The description of each tensor, where the first one's bytes begin, and how many bytes of tensors there are."""
        whole = file.seek(0, 2)
        file.seek(0)
        first = file.read(_LENGTH.size)
        if len(first) < _LENGTH.size:
            raise ValueError(f"it has {whole} bytes")
        (length,) = _LENGTH.unpack(first)
        begin = _LENGTH.size + length
        if length > self._most_header_bytes or begin > whole:
            raise ValueError(f"its header has {length} bytes, and the file {whole}")
        header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
        header.pop(_METADATA, None)
        return header, begin, whole - begin

    def _compare(self, theirs: Mapping[str, str]) -> None:
        for name in sorted(self._told.keys() | theirs.keys()):
            if self._told.get(name) != theirs.get(name):
                raise Declined(
                    f"the version is of another model than the task installed here: tensor {name[:100]!r} is "
                    f"{theirs.get(name, 'missing')[:100]} where {self._told.get(name, 'nothing')} is expected"
                )


def _told(about: Any) -> str:
    return f"{about.get('dtype')} {about.get('shape')}" if isinstance(about, dict) else "not described"


def _offset(about: dict[str, Any], entry: Entry, size: int) -> int:
    """Where a tensor's bytes begin. Raises Declined: not all of them are there."""
    needed = math.prod(entry.shape) * _TYPES[entry.dtype].itemsize
    match about.get("data_offsets"):
        case [int(begin), int(end)] if 0 <= begin <= end <= size and end - begin == needed:
            return begin
        case other:
            raise _not_safetensors(f"tensor {entry.name[:100]!r} of {needed} bytes is said to lie at {str(other)[:100]} of {size}")


def _bytes_of(tensor: Tensor) -> memoryview:
    """The bytes themselves, to be written to."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _read_exactly(file: BufferedIOBase, begin: int, into: memoryview) -> None:
    file.seek(begin)
    while into:
        count = file.readinto(into)
        if not count:
            raise _not_safetensors("it ends before its last tensor does")
        into = into[count:]


def _not_safetensors(why: str) -> Declined:
    return Declined(f"the version is no safetensors file ({brief(why)}): nothing else is opened here")
