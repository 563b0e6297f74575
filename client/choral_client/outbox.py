"""Results that no receipt has come for yet, in files: they outlive a broken link and the end of the client."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import structlog
from choral.codecs import MASKED
from choral.durable import remove_leftovers, write_all
from choral.errors import Declined
from choral.messages import UploadHeader
from choral.metrics import Metric
from choral.plan import Kind

log = structlog.get_logger()
T = TypeVar("T")
_INT_BITS = 63  # and the sign
KEPT = 4  # each is as large as the model, and the older a result is, the less likely is it still wanted
_END = struct.Struct("<32sI8s")  # after the payload and the header (JSON): SHA-256 of the header, its length, magic
_MAGIC = b"choral-2"
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Parcel:
    """A result as it is kept: its header, the round that it belongs to, for people, and what noise of this device's hides in it."""

    header: UploadHeader
    round: int
    hidden: tuple[str, ...] = ()

    @property
    def masked(self) -> bool:
        """Whether nobody sees it but in a sum."""
        return self.header.codec == MASKED


class Kept:
    """The payload of a result, in the first `size` bytes of an open file. It can be read even when the file has been removed."""

    def __init__(self, path: Path, size: int) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        self._size = size

    def __del__(self) -> None:
        """Close the file."""
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def __len__(self) -> int:
        """How many bytes."""
        return self._size

    def __getitem__(self, span: slice) -> bytes:
        """Some of them."""
        start, stop, _ = span.indices(self._size)
        return os.pread(self._descriptor, max(0, stop - start), start)


class Outbox:
    """One file per result, named after the assignment. May be used from several threads.

    Nothing is made durable: a result that a power cut takes is found to be missing or damaged, and the work, done again, gives the
    same one.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = threading.Lock()  # a look around must not meet a file that is only half there

    def __contains__(self, assignment: str) -> bool:
        return self._path(assignment).exists()

    def save(self, parcel: Parcel, payload: Iterable[bytes | memoryview]) -> tuple[Parcel, Kept]:
        """Keep a result; beyond `KEPT` the oldest goes. Returns it as `load` does: the header has the payload's digest and length.

        Raises Declined: the disk is full or cannot be written.
        """
        path = self._path(parcel.header.assignment)
        aside = path.with_name(f".{path.name}.aside")
        try:
            with self._files:
                if not self._folder.exists():
                    self._folder.mkdir()
                parcel = _write(aside, parcel, payload)
                kept = Kept(aside, parcel.header.payload_bytes)
                aside.replace(path)
                for old in self._oldest_first()[:-KEPT]:
                    log.warning("too many results wait to be sent; the oldest is given up", kept=KEPT)
                    old.unlink(missing_ok=True)
        except OSError as error:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
            raise Declined(
                f"the result cannot be kept in {self._folder} ({error.strerror}): make room there, or give another folder as state"
            ) from error
        return parcel, kept

    def load(self, assignment: str) -> tuple[Parcel, Kept] | None:
        """A result and its payload, verified; None if there is none, or it is damaged: then it is removed."""
        path = self._path(assignment)
        try:
            parcel, payload = _read(path)
            digest = hashlib.sha256()
            for offset in range(0, len(payload), _READ_BYTES):
                digest.update(payload[offset : offset + _READ_BYTES])
            if digest.digest() != parcel.header.digest:
                raise ValueError("its payload does not match its digest")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            _discard(path, str(error))
            return None
        return parcel, payload

    def assignments(self) -> list[str]:
        """Whose results are here, oldest first. Files that are none are removed."""
        with self._files:
            return list(self._look_around())

    def remove(self, assignment: str) -> None:
        """Forget a result, if it is here."""
        try:
            self._path(assignment).unlink(missing_ok=True)
        except OSError as error:
            log.warning("a result that was sent cannot be removed", file=str(self._path(assignment)), reason=str(error))

    def _path(self, assignment: str) -> Path:
        return self._folder / f"{hashlib.sha256(assignment.encode()).hexdigest()}.result"  # an id may hold anything

    def _oldest_first(self) -> list[Path]:
        return sorted(self._folder.glob("*.result"), key=_written_ns)

    def _look_around(self) -> Iterator[str]:
        try:
            remove_leftovers(self._folder)
            known = self._oldest_first()
            foreign = set(self._folder.iterdir()).difference(known)
        except OSError:  # nothing was ever saved here, or nothing can be read
            return
        for path in foreign:
            _discard(path, "it is no result")
        for path in known:
            try:
                assignment = _read(path)[0].header.assignment
                if path != self._path(assignment):
                    raise ValueError("it is named after another assignment")
                yield assignment
            except (OSError, ValueError) as error:
                _discard(path, str(error))


def _written_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:  # sent meanwhile
        return 0


def _plain(value: object) -> object:
    if isinstance(value, Kind):
        return value.value
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(f"a {type(value).__name__} in a header")


def _write(path: Path, parcel: Parcel, payload: Iterable[bytes | memoryview]) -> Parcel:
    """Write the payload, and behind it the header, which says what the payload turned out to be."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for piece in payload:
            write_all(file.fileno(), memoryview(piece))
            digest.update(piece)
            size += len(piece)
        parcel = replace(parcel, header=replace(parcel.header, digest=digest.digest(), payload_bytes=size))
        header = json.dumps(asdict(parcel), default=_plain).encode()
        end = _END.pack(hashlib.sha256(header).digest(), len(header), _MAGIC)
        write_all(file.fileno(), memoryview(header + end))
    return parcel


def _read(path: Path) -> tuple[Parcel, Kept]:
    """The parcel, verified, and its payload, whose length alone is. Raises OSError; ValueError: it is not what `save` wrote."""
    size = path.stat().st_size
    whole = Kept(path, size)
    if size < _END.size:
        raise ValueError("it is too short")
    digest, length, magic = _END.unpack(whole[size - _END.size : size])
    payload_bytes = size - _END.size - length
    header = whole[max(0, payload_bytes) : size - _END.size]
    if magic != _MAGIC or payload_bytes < 0 or hashlib.sha256(header).digest() != digest:
        raise ValueError("its header does not match its checksum")
    try:
        parcel = _parcel(json.loads(header))
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"its header is of another release ({error})") from None
    if payload_bytes != parcel.header.payload_bytes:
        raise ValueError(f"it holds {payload_bytes} of {parcel.header.payload_bytes} bytes")
    return parcel, Kept(path, payload_bytes)


def _parcel(read: dict[str, Any]) -> Parcel:
    """Raises KeyError, TypeError or ValueError: something is missing, or is not what it should be."""
    header: dict[str, Any] = read["header"]
    plain = {"assignment": str, "client": str, "examples": int, "payload_bytes": int, "offset": int}
    typed: dict[str, Any] = {
        "kind": Kind(header["kind"]),
        "digest": bytes.fromhex(header["digest"]),
        "held_out": tuple(_metric(**metric) for metric in header["held_out"]),
        "work": tuple(_metric(**metric) for metric in header["work"]),
    }
    fields: dict[str, Any] = {name: _typed(kind, header[name]) for name, kind in plain.items()}
    typed["codec"] = _typed(str, header.get("codec", ""))  # which earlier releases did not write
    hidden = tuple(_typed(str, name) for name in read.get("hidden", ()))
    return Parcel(UploadHeader(**fields, **typed), _typed(int, read["round"]), hidden)


def _metric(name: Any, value: Any, examples: Any) -> Metric:
    return Metric(_typed(str, name), float(value), _typed(int, examples))


def _typed(kind: type[T], value: Any) -> T:
    """The value, as a message can hold it. Raises TypeError or ValueError."""
    if type(value) is not kind:
        raise TypeError(f"{str(value)[:80]!r} is no {kind.__name__}")
    if isinstance(value, str):
        value.encode()
    if isinstance(value, int) and value.bit_length() > _INT_BITS:
        raise ValueError(f"a number of {value.bit_length()} bits")
    return value


def _discard(path: Path, reason: str) -> None:
    log.warning("a saved result cannot be used", file=str(path), reason=reason)
    try:
        path.unlink(missing_ok=True)
    except OSError as error:  # a folder, or no right to write here
        log.warning("nor can it be removed", file=str(path), reason=str(error))
