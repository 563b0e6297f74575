"""One client at a time in a state folder: two would spend the same privacy, and send each other's results."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from choral.errors import ConfigError

NAME = "lock"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder as long as this lasts; the system lets go of it if the process dies. Raises ConfigError: another has it."""
    path = folder / NAME
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}): give a state folder that this user may write") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"state: another client runs with {folder}: end that one, or give another folder") from error
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be locked ({error.strerror}): give a state folder on a disk of this machine"
            ) from error
        yield
    finally:
        os.close(descriptor)
