"""The state folder belongs to one process at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from choral.errors import ConfigError


def lock_of(folder: Path) -> Path:
    """The file that says whose a state folder is."""
    return folder / "lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder if it is not there, and have it alone; a process that is killed lets go of it. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(lock_of(folder), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(f"state: {folder} cannot be used ({error.strerror}): give a folder that this user may write") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise ConfigError(f"state: {folder} is in use by a coordinator: stop it, or give another folder") from error
    try:
        yield
    finally:
        os.close(lock)
