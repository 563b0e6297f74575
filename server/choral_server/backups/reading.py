"""Reading a backup: every byte is verified before anything is done with it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any, cast

from choral import __version__
from choral.errors import ConfigError
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Table

from choral_server import history_key
from choral_server.backups.contents import (
    ABOUT,
    CONTENTS,
    FORMAT,
    PIECE_BYTES,
    ROWS_AT_A_TIME,
    TABLES,
    KeptVersion,
    Progress,
    known_schemas,
    needed_versions,
    rows_in,
    rows_name,
)
from choral_server.tables import RUNS, VERSIONS, Row

_RUN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")  # it becomes a folder


class Backup:
    """A backup file, opened for reading and found whole. Raises ConfigError wherever it is not what it should be."""

    def __init__(self, path: Path, file: IO[bytes], tar: tarfile.TarFile, progress: Progress) -> None:
        self.path = path
        self._file = file
        self._tar = tar
        self._progress = progress
        self._members: dict[str, tarfile.TarInfo] = {}
        self.files: dict[str, str] = {}
        self.versions: list[KeptVersion] = []
        self.runs: list[Row] = []
        self.taken_at: datetime
        self._done = self._total = 0

    @classmethod
    @contextmanager
    def open(cls, path: Path, progress: Progress) -> Iterator[Backup]:
        """Open and verify it: every byte is read once before anything is done with it."""
        with ExitStack() as stack:
            try:
                file = stack.enter_context(path.open("rb"))
                whole = cast(IO[bytes], _Whole(file, file.seek(0, os.SEEK_END)))
                file.seek(0)
                tar = stack.enter_context(tarfile.open(fileobj=whole, mode="r:"))
            except OSError as error:
                raise ConfigError(f"{path} cannot be read ({error.strerror}): give a file that `choral backup` wrote") from error
            except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
                raise _no_backup(path) from error
            backup = cls(path, file, tar, progress)
            with backup._reading():
                backup._verify()
            yield backup

    def rows(self, table: Table) -> Iterator[list[Row]]:
        """The rows of a table, some at a time."""
        batch: list[Row] = []
        with self._reading(), self._member(rows_name(table)) as content:
            for row in rows_in(table, content):
                batch.append(row)
                if len(batch) == ROWS_AT_A_TIME:
                    yield batch
                    batch = []
        if batch:
            yield batch

    @property
    def history_key(self) -> Ed25519PrivateKey | None:
        """The key that signs the history, if it is there. Raises TrustError: it is none."""
        if history_key.NAME not in self.files:
            return None
        with self._reading(), self._member(history_key.NAME) as content:
            return history_key.parsed(content.read(), f"{history_key.NAME} in {self.path}")

    def content(self, name: str) -> bytes:
        """A file."""
        member = self._members[name]
        with self._reading():
            self._file.seek(member.offset_data)
            content = self._file.read(member.size)
        self.advance(len(content))
        return content

    def advance(self, size_bytes: int) -> None:
        """So much more is done."""
        self._done += size_bytes
        self._progress(self._done, self._total)

    def _verify(self) -> None:
        first = self._tar.next()
        if first is None or first.name != ABOUT or not _is_plain(first):
            raise _no_backup(self.path)
        with self._member_content(first) as content:
            about = json.load(content)
        self._check(about)
        self.taken_at = datetime.fromisoformat(about["taken_at"])
        self._members = {member.name: member for member in self._tar if _is_plain(member)}
        with self._member(CONTENTS) as content:
            contents = json.load(content)["files"]
        versions = {name: found["size"] for name, found in contents.items() if name.startswith("runs/")}
        self._total = 2 * sum(versions.values())  # once here, once when they are written
        for name, found in contents.items():
            self._verify_member(name, found, counts=name in versions)
        self.files = {name: found["sha256"] for name, found in contents.items()}
        for table in TABLES:
            with self._member(rows_name(table)) as content:
                for row in rows_in(table, content):
                    self._take_note(table, row)
        self._check_runs()

    def _check(self, about: dict[str, Any]) -> None:
        by, schema, known = f"release {about['release']}", about["schema"], known_schemas()
        if about["format"] > FORMAT:
            raise ConfigError(
                f"{self.path} was written by {by} in format {about['format']}, and this release ({__version__}) reads up to "
                f"{FORMAT}: restore it with that release or a later one"
            )
        if schema not in known:
            raise ConfigError(
                f"{self.path} was written by {by} with schema {schema}, which this release ({__version__}, schema {known[0]}) "
                "does not know: restore it with that release or a later one"
            )
        if schema != known[0]:
            raise ConfigError(
                f"{self.path} was written by {by} with schema {schema}, and this release ({__version__}) has {known[0]}: "
                "restore it with that release, then let this one's coordinator bring the database up to date"
            )

    def _verify_member(self, name: str, expected: dict[str, Any], counts: bool) -> None:
        digest, size = hashlib.sha256(), 0
        with self._member(name) as content:
            while piece := content.read(PIECE_BYTES):
                digest.update(piece)
                size += len(piece)
                if counts:
                    self.advance(len(piece))
        if (digest.hexdigest(), size) != (expected["sha256"], expected["size"]):
            raise ValueError(f"{name} is not what was written")

    def _take_note(self, table: Table, row: Row) -> None:
        if table is RUNS:
            if not _RUN_NAME.fullmatch(row["name"]):
                raise ValueError(f"{row['name']!r} is no name of a run")
            self.runs.append(row)
        elif table is VERSIONS:
            version = KeptVersion(row["run"], row["number"], row["digest"], row["size_bytes"])
            if version.weights not in self.files:
                return
            if self.files[version.weights] != version.digest.hex():
                raise ValueError(f"{version.weights} is another than the one published")
            self.versions.append(version)

    def _check_runs(self) -> None:
        if not self.runs:
            raise ValueError("it holds no run")
        if strange := {version.run for version in self.versions} - {run["name"] for run in self.runs}:
            raise ValueError(f"it holds a version of {min(strange)!r}, and no such run")  # which becomes a folder, too
        if missing := set(needed_versions(self.runs)) - {version.key for version in self.versions}:
            run, number = min(missing)
            raise ValueError(f"version {number} of run {run} is not in it")

    def _member(self, name: str) -> IO[bytes]:
        return self._member_content(self._members[name])

    def _member_content(self, member: tarfile.TarInfo) -> IO[bytes]:
        content = self._tar.extractfile(member)
        if content is None:
            raise ValueError(f"{member.name} is no file")
        return content

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except KeyError as error:
            raise self._damaged(f"it has no {error.args[0]}: was it cut off?") from error
        except (OSError, tarfile.TarError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, why: str) -> ConfigError:
        return ConfigError(f"{self.path} is damaged ({why}): copy it again from where it was written, or give an earlier backup")


class _Whole:
    """A file of `size` bytes of which nobody reads more than there is, whatever a header promises: nor is that much reserved."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._size = size

    def read(self, size: int) -> bytes:
        return self._file.read(max(0, min(size, self._size - self._file.tell())))

    def seek(self, offset: int) -> int:
        return self._file.seek(offset)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True


def _is_plain(member: tarfile.TarInfo) -> bool:
    """A file as `choral backup` writes it: no link or device, and without holes, which could be larger than any disk."""
    return member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()


def _no_backup(path: Path) -> ConfigError:
    return ConfigError(f"{path} is no backup: give a file that `choral backup` wrote")
