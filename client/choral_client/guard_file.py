"""The guard's file, read anew whenever its owner has changed it."""

from __future__ import annotations

import threading
from pathlib import Path

from choral.config import read
from choral.errors import ConfigError, Declined, TrustError
from choral.identity import certificates

from choral_client.guard import Guard

NAME = "guard.yaml"


class GuardFile:
    """`path`, or else guard.yaml in the client's `folder`, if there is one. May be used from several threads.

    Raises ConfigError: the file cannot be read or holds what is not allowed, or the one at `path` is missing.
    """

    def __init__(self, folder: Path, path: Path | None = None) -> None:
        self._path = path if path is not None else folder / NAME
        self._reading = threading.Lock()
        self._guard = Guard()
        self._content: bytes | None = None  # of the file that `_guard` stands in
        self._wanted = path is not None or self._path.exists()
        if self._wanted:
            self._read()

    def current(self) -> Guard:
        """The guard as its owner wants it now. Raises Declined: the file is broken, or it was there and is gone."""
        with self._reading:
            self._wanted = self._wanted or self._path.exists()
            if not self._wanted:
                return self._guard
            try:
                self._read()
            except ConfigError as error:
                raise Declined(f"this device's guard cannot be used, so nothing is done: {error}") from error
            return self._guard

    def _read(self) -> None:
        try:
            content = self._path.read_bytes()
        except OSError as error:
            self._content = None
            raise ConfigError(
                f"{self._path}: cannot be read ({error.strerror}): put the guard back, or start without one"
            ) from error
        if content != self._content:  # its time alone may not tell: two edits can fall into one tick of the clock
            self._content = None
            self._guard = _guard_in(self._path)
            self._content = content


def _guard_in(path: Path) -> Guard:
    """The guard in a file, with the path of its authority as it counts from the file's folder."""
    guard = read(path, Guard)
    if guard.authority is None:
        return guard
    authority = path.resolve().parent / guard.authority
    try:
        certificates(authority)
    except TrustError as error:
        raise ConfigError(f"{path}: authority: {error}") from error
    return guard.model_copy(update={"authority": authority})
