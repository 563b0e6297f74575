"""Results that no receipt has come for yet, in files: they outlive a broken link and the end of the client."""

from __future__ import annotations

import hashlib
import json
import mmap
import struct
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import structlog
from choral.durable import remove_leftovers, sync_folder, write_durably
from choral.errors import Declined
from choral.messages import UploadHeader
from choral.metrics import Metric
from choral.plan import Kind

log = structlog.get_logger()
T = TypeVar("T")
_INT_BITS = 63  # and the sign
KEPT = 4  # each is as large as the model, and the older a result is, the less likely is it still wanted
_PREFIX = struct.Struct("<8s32sI")  # magic, SHA-256 of the header, its length; then the header (JSON) and the payload
_MAGIC = b"choral-1"


@dataclass(frozen=True, slots=True)
class Parcel:
    """A result as it is kept: its header, and the round that it belongs to, for people."""

    header: UploadHeader
    round: int


class Outbox:
    """One file per result, named after the assignment. May be used from several threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = threading.Lock()  # a look around must not meet a file that is only half there

    def __contains__(self, assignment: str) -> bool:
        return self._path(assignment).exists()

    def save(self, parcel: Parcel, payload: memoryview) -> None:
        """Keep a result, durably; beyond `KEPT` the oldest goes. Raises Declined: the disk is full or cannot be written."""
        header = json.dumps(asdict(parcel), default=_plain).encode()
        prefix = _PREFIX.pack(_MAGIC, hashlib.sha256(header).digest(), len(header))
        try:
            with self._files:
                if not self._folder.exists():
                    self._folder.mkdir()
                    sync_folder(self._folder.parent)
                path = self._path(parcel.header.assignment)
                write_durably(path, prefix, header, payload)
                for old in self._oldest_first()[:-KEPT]:
                    log.warning("too many results wait to be sent; the oldest is given up", kept=KEPT)
                    old.unlink(missing_ok=True)
        except OSError as error:
            raise Declined(
                f"the result cannot be kept in {self._folder} ({error.strerror}): make room there, or give another folder as state"
            ) from error

    def load(self, assignment: str) -> tuple[Parcel, memoryview] | None:
        """A result and its payload, verified; None if there is none, or it is damaged: then it is removed."""
        path = self._path(assignment)
        try:
            parcel, payload = _read(path)
            if hashlib.sha256(payload).digest() != parcel.header.digest:
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


def _read(path: Path) -> tuple[Parcel, memoryview]:
    """The parcel, verified, and its payload, whose length alone is. Raises OSError; ValueError: it is not what `save` wrote.

    The payload stays on the disk until it is read.
    """
    with path.open("rb") as file:
        try:
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            magic, digest, length = _PREFIX.unpack_from(content)
        except (ValueError, struct.error):
            raise ValueError("it is too short") from None
    header, payload = content[_PREFIX.size : _PREFIX.size + length], content[_PREFIX.size + length :]
    if magic != _MAGIC or hashlib.sha256(header).digest() != digest:
        raise ValueError("its header does not match its checksum")
    try:
        parcel = _parcel(json.loads(bytes(header)))
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"its header is of another release ({error})") from None
    if len(payload) != parcel.header.payload_bytes:
        raise ValueError(f"it holds {len(payload)} of {parcel.header.payload_bytes} bytes")
    return parcel, payload


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
    return Parcel(UploadHeader(**fields, **typed), _typed(int, read["round"]))


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
