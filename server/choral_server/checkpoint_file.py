"""A safetensors file as the coordinator reads and writes it: in pieces, never mapped and never whole in memory.

A file that is mapped once per reader counts once per mapping in the resident memory, and a whole model in memory once per model.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from choral.durable import Steadily
from choral.elements import ITEM_BYTES, Buffer
from safetensors import safe_open

BLOCK = 1 << 18  # elements worked on at a time: the temporaries stay in the cache
_METADATA, _ALIGNMENT = "__metadata__", 8
_FEW = 4  # pieces that are not worth a thread


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor in a file: `dtype` as safetensors writes it, `shape` in elements, and where its bytes begin in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    size_bytes: int

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class CheckpointFile:
    """An open file, which can be read until nobody has this object any more, even if its name is gone by then."""

    def __init__(self, path: Path) -> None:
        """Raises SafetensorError or OSError."""
        with safe_open(path, "numpy"):
            pass  # it has looked at the header: what is read of it below is as it must be
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        length = int.from_bytes(self._read(0, 8), "little")
        self._header: dict[str, Any] = json.loads(self._read(8, length))
        told = sorted(((n, one) for n, one in self._header.items() if n != _METADATA), key=lambda told: told[1]["data_offsets"])
        self.tensors = {
            name: Stored(name, one["dtype"], tuple(one["shape"]), 8 + length + begin, end - begin)
            for name, one in told
            for begin, end in [one["data_offsets"]]
        }

    def read(self, tensor: Stored, start: int, stop: int) -> bytes:
        """The bytes of a tensor's elements from `start` to `stop`. Raises OSError."""
        item = ITEM_BYTES[tensor.dtype]
        return self._read(tensor.begin + start * item, (stop - start) * item)

    def pieces(self, tensor: Stored) -> Iterator[bytes]:
        """All its bytes. Raises OSError."""
        for start in range(0, tensor.size_bytes, 4 * BLOCK):
            yield self._read(tensor.begin + start, min(4 * BLOCK, tensor.size_bytes - start))

    def write_like(self, path: Path, metadata: Mapping[str, str], changed: Mapping[str, Iterable[Buffer]]) -> bytes:
        """Write a file of the same tensors, those in `changed` with new bytes, for good; its SHA-256. Raises OSError.

        One key of metadata at most: safetensors writes several in random order.
        """
        digest, offset = hashlib.sha256(), 0
        with Steadily(path) as file, _ahead(self._all_of(metadata, changed)) as pieces:
            for piece in pieces:
                file.write(piece, offset)
                digest.update(piece)
                offset += len(piece)
        return digest.digest()

    def _all_of(self, metadata: Mapping[str, str], changed: Mapping[str, Iterable[Buffer]]) -> Iterator[Buffer]:
        tensors = {name: one for name, one in self._header.items() if name != _METADATA}
        yield header(({_METADATA: dict(metadata)} if metadata else {}) | tensors)
        for name, tensor in self.tensors.items():
            yield from changed[name] if name in changed else self.pieces(tensor)

    def _read(self, offset: int, length: int) -> bytes:
        """Raises OSError: also if there is less."""
        piece = os.pread(self._descriptor, length, offset)
        if len(piece) < length:
            raise OSError(f"a checkpoint has {len(piece)} bytes at {offset} where {length} are expected: it was cut short")
        return piece


@contextmanager
def _ahead(pieces: Iterator[Buffer]) -> Iterator[Iterator[Buffer]]:
    """The same pieces; while one is worked on, another thread makes the next. The first few are made here."""

    def made() -> Iterator[Buffer]:
        coming = worker.submit(next, pieces, None)
        while (piece := coming.result()) is not None:
            coming = worker.submit(next, pieces, None)
            yield piece

    with ThreadPoolExecutor(1) as worker:  # starts its thread when there is work for it
        yield chain(islice(pieces, _FEW), made())


def header(tensors: Mapping[str, Any]) -> bytes:
    """The beginning of a file, as the safetensors library writes it."""
    told = json.dumps(tensors, separators=(",", ":"), ensure_ascii=False).encode()
    told += b" " * (-len(told) % _ALIGNMENT)
    return len(told).to_bytes(8, "little") + told
