"""How long this device has worked today, in a file: restarts do not begin the day anew."""

from __future__ import annotations

import json
import math
import threading
from datetime import date
from pathlib import Path

from choral.durable import write_durably
from choral.errors import Declined

NAME = "work.json"


class DayBook:
    """Seconds of work on the last day on which there was any. May be used from several threads."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._writing = threading.Lock()

    def worked_s(self, day: date) -> float:
        """Seconds of work on that day so far. Raises Declined: the file cannot be read, or is damaged."""
        try:
            content = json.loads(self._path.read_bytes())
            seconds = content["worked_s"] if content["day"] == day.isoformat() else 0.0
            if not (isinstance(seconds, int | float) and math.isfinite(seconds)):
                raise ValueError("worked_s is no number")
        except FileNotFoundError:
            return 0.0
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise Declined(f"{self._path}: what this device has worked today cannot be read ({error}): remove the file") from error
        return max(float(seconds), 0.0)

    def add(self, day: date, seconds: float) -> None:
        """Book work, or give back what was booked and not used; durably. Raises Declined: the disk is full or cannot be written."""
        with self._writing:
            worked_s = max(self.worked_s(day) + seconds, 0.0)
            try:
                write_durably(self._path, json.dumps({"day": day.isoformat(), "worked_s": worked_s}).encode())
            except OSError as error:
                raise Declined(
                    f"{self._path}: work cannot be written down ({error.strerror}), so none is done: make room there"
                ) from error
