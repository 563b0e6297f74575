"""What this client's updates have left out so far, in files: error feedback that neither a crash nor a lost answer confuses.

residual/current    what is added to the next update
residual/pending    what is to be added after it, once the coordinator has taken that update

A codec such as top-k sends a part of an update, and the rest is added to the next one (Seide et al. 2014, Interspeech, §3;
Karimireddy et al. 2019, ICML, algorithm 2). The step from one residual to the next is taken only when the coordinator says
that the update counts. Until then the same work starts from the same residual and gives the same bits. An update that comes
to nothing, because it was late, withdrawn or lost, leaves the residual as it was: what of it was in that update goes back,
and the work of that round alone is lost, as it is without compression. An update that is refused takes the residual with it,
which may be what was wrong with it.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import structlog
from choral.codecs import Vector, counts
from choral.durable import durable_file, remove_leftovers, sync_folder
from choral.errors import Declined
from choral.messages import Verdict

log = structlog.get_logger()
_MAGIC = b"choral-residual1"
_LENGTH = struct.Struct("<I")
_LONGEST_BYTES = 1 << 16  # of the header
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class About:
    """Whose residual it is: `scope` tells coordinator, run and model, `assignment` whose update has left it, `size` in elements."""

    scope: str
    assignment: str
    size: int


@dataclass(frozen=True, slots=True)
class Feedback:
    """One update's: `blocks()` are added to it, and `keep` gets, block by block, what it leaves out."""

    blocks: Callable[[], Iterator[Vector]]
    keep: Callable[[Vector], None]


class Residual:
    """The residual of the client whose state folder this is. One update at a time uses it; `settle` may be called from anywhere."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "residual"
        self._current = self._folder / "current"
        self._pending = self._folder / "pending"

    @contextmanager
    def feedback(self, about: About) -> Iterator[Feedback]:
        """For the update of `about.assignment`; what it leaves out is pending, and durable, when the context ends well.

        Raises Declined: the disk is full or cannot be written.
        """
        try:
            if not self._folder.exists():
                self._folder.mkdir()
                sync_folder(self._folder.parent)
            remove_leftovers(self._folder)
            self._drop_stale(about)
            with durable_file(self._pending) as write:
                checksum = _write_header(write, about)

                def keep(block: Vector) -> None:
                    nonlocal checksum
                    content = block.astype("<f4", copy=False).data
                    checksum = zlib.crc32(content, checksum)
                    write(content)

                yield Feedback(lambda: self._blocks(about.size), keep)
                write(_LENGTH.pack(checksum))
        except OSError as error:
            raise Declined(
                f"what the update leaves out cannot be kept in {self._folder} ({error.strerror}): "
                "make room there, or give another folder as state"
            ) from error

    def settle(self, assignment: str, verdict: Verdict) -> None:
        """The coordinator has said what became of this assignment's update. Called before its result is forgotten."""
        pending = _about(self._pending)
        if pending is None or pending.assignment != assignment:  # it left nothing out, or this was done before
            return
        try:
            if verdict in (Verdict.ACCEPTED, Verdict.DUPLICATE):
                self._pending.replace(self._current)
                sync_folder(self._folder)
            else:
                self._pending.unlink()
                if verdict is Verdict.REFUSED:
                    self._current.unlink(missing_ok=True)
        except OSError as error:
            log.warning("what an update left out cannot be kept", folder=str(self._folder), reason=error.strerror)

    def _drop_stale(self, about: About) -> None:
        """Delete what is no residual of this model, and what nobody will settle any more."""
        pending = _about(self._pending)
        if pending is not None and pending.assignment != about.assignment:
            log.warning("an earlier update may have counted or not: what was left out until then is given up")
            self._current.unlink(missing_ok=True)
        if pending is None or pending.assignment != about.assignment:
            self._pending.unlink(missing_ok=True)
        current = _about(self._current)
        if current is not None and current.assignment == about.assignment:
            log.warning("an update that counted is asked for again: what was left out until then is given up")
            self._current.unlink()
        if not self._current.exists():
            return
        current = _about(self._current)
        if current is None or (current.scope, current.size) != (about.scope, about.size):
            log.info("what earlier updates left out is of another model or run, and given up")
        elif _is_whole(self._current):
            return
        else:
            log.warning("what earlier updates left out is damaged, and given up", file=str(self._current))
        self._current.unlink()

    def _blocks(self, size: int) -> Iterator[Vector]:
        """The current residual, or zeros if there is none."""
        if not self._current.exists():
            yield from (np.zeros(count, np.float32) for count in counts(size))
            return
        with self._current.open("rb") as file:
            file.seek(len(_MAGIC))
            file.seek(_LENGTH.unpack(file.read(_LENGTH.size))[0], 1)
            for count in counts(size):
                yield np.frombuffer(file.read(4 * count), "<f4").astype(np.float32, copy=False)


def _write_header(write: Callable[[bytes], None], about: About) -> int:
    """The checksum of what was written."""
    content = json.dumps(asdict(about)).encode()
    header = _MAGIC + _LENGTH.pack(len(content)) + content
    write(header)
    return zlib.crc32(header)


def _about(path: Path) -> About | None:
    """What a file says of itself; None: there is none, or it is no residual."""
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                return None
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            about = About(**json.loads(file.read(min(length, _LONGEST_BYTES))))
            if type(about.size) is not int or about.size < 0:
                return None
            whole = len(_MAGIC) + 2 * _LENGTH.size + length + 4 * about.size
            return about if path.stat().st_size == whole else None
    except (OSError, TypeError, ValueError, RecursionError, struct.error):
        return None


def _is_whole(path: Path) -> bool:
    """Whether the file ends with the checksum of what stands before."""
    checksum, left = 0, path.stat().st_size - _LENGTH.size
    with path.open("rb") as file:
        while left > 0 and (piece := file.read(min(left, _PIECE_BYTES))):
            checksum, left = zlib.crc32(piece, checksum), left - len(piece)
        return file.read() == _LENGTH.pack(checksum)
