"""The heads of the coordinator's history that this client was handed: kept, so that a history that is cut or replaced shows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import structlog
from choral.durable import write_durably
from choral.heads import Head, fingerprint, from_line, is_genuine, to_line

log = structlog.get_logger()
NAME = "heads.jsonl"
_KEPT = 1000


class Heads:
    """The file `heads.jsonl` in the client's state folder, a head a line, the newest last; the newest `kept` stay.

    The key of the first is the coordinator's for ever: a head by another is warned of, and not kept.
    """

    def __init__(self, folder: Path, kept: int = _KEPT) -> None:
        self._path = folder / NAME
        self._kept = kept
        self._lines = 0
        self._damaged = False
        self.newest: Head | None = None
        for head in self._read():
            self.newest, self._lines = head, self._lines + 1

    def take(self, head: Head | None) -> str | None:
        """Keep a head that was handed out; why not, if it shows that the history was cut or replaced: for the caller to tell."""
        if (fault := self._fault(head)) is not None:
            return fault
        if head is not None and (self.newest is None or head.sequence > self.newest.sequence):
            self._keep(head)
        return None

    def _fault(self, head: Head | None) -> str | None:
        newest = self.newest
        if head is None:
            return None if newest is None else f"no head is handed out any more, and it stood at entry {newest.sequence}"
        if newest is not None and head.key != newest.key:
            return (
                f"it is signed with key {fingerprint(head.key)}, and was with {fingerprint(newest.key)}: it is another "
                f"coordinator's or was replaced; ask its operator and, if that is as it should be, move {self._path} away"
            )
        if not is_genuine(head):
            return f"entry {head.sequence} has no good signature: ask the coordinator's operator to verify it (choral audit verify)"
        if (
            newest is not None
            and head.sequence <= newest.sequence
            and (head.sequence, head.digest) != (newest.sequence, newest.digest)
        ):
            return (
                f"it stands at entry {head.sequence} ({head.digest.hex()[:16]}), and stood at entry {newest.sequence} "
                f"({newest.digest.hex()[:16]}): it was cut off or written anew, or restored from a backup; give {self._path} to "
                "the coordinator's operator (choral audit verify --head)"
            )
        return None

    def _keep(self, head: Head) -> None:
        """Add a line; the first one, which says whose history it is, is there to stay when this returns."""
        try:
            if self._lines == 0 or self._lines >= 2 * self._kept or self._damaged:
                lines = [to_line(kept) for kept in [*self._read(), head]][-self._kept :]
                write_durably(self._path, "".join(lines).encode())
                self._lines, self._damaged = len(lines), False
            else:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(to_line(head))
                self._lines += 1
        except OSError as error:
            log.warning("head of the history not kept", file=str(self._path), reason=error.strerror)
        self.newest = head

    def _read(self) -> Iterator[Head]:
        """The heads in the file. A line that a crash left half-written is passed over."""
        try:
            with self._path.open(encoding="utf-8", errors="replace") as file:
                for number, line in enumerate(file, 1):
                    try:
                        yield from_line(line)
                    except ValueError as error:
                        self._damaged = True
                        log.warning("no head of the history", file=str(self._path), line=number, reason=str(error))
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("heads of the history not read", file=str(self._path), reason=error.strerror)
