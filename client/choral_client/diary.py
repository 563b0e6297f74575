"""What the client is doing, in a small file for people and health checks."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import structlog
from choral.errors import ConfigError

log = structlog.get_logger()
_NAME = "status.json"
_LATEST = 2**53  # seconds since 1970 of which a float is exact


class Diary:
    """Writes `status.json` in the client's state folder, atomically."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lasting: dict[str, Any] = {}
        self._newest: tuple[str, dict[str, Any]] = "starting", {}

    def remember(self, **details: Any) -> None:
        """What each note tells from now on, until the client ends; the newest one at once."""
        self._lasting |= details
        doing, known = self._newest
        self.write(doing, **known)

    def write(self, doing: str, **details: Any) -> None:
        """Note what the client does now; `details` are for people. A disk that is full ends nothing but the notes."""
        self._newest = doing, details
        aside = self._folder / f".{_NAME}.part"
        try:
            aside.write_text(json.dumps({"doing": doing, "at": time.time(), **self._lasting, **details}), encoding="utf-8")
            aside.replace(self._folder / _NAME)
        except OSError as error:
            log.warning("status not written", folder=str(self._folder), reason=str(error))


def read(folder: Path) -> dict[str, Any]:
    """The last note and its age in seconds, `age_s`. Raises ConfigError: there is none, or it is damaged."""
    path = folder / _NAME
    try:
        note: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not (isinstance(note["doing"], str) and isinstance(note["at"], int | float) and abs(note["at"]) < _LATEST):
            raise ValueError("it does not say what the client does, or when that was")
        return note | {"age_s": round(time.time() - note["at"], 1)}
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: does not exist; no client has run with this state folder") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}): give the client's state folder") from error
    except KeyError as error:
        raise ConfigError(f"{path}: is damaged (it has no {error}): start the client again") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: is damaged ({error}): start the client again") from error
