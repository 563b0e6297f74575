"""What keeps the coordinator from going on at present, by subject: a database that is gone, a disk that is full."""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

log = structlog.get_logger()


class Troubles:
    """The present troubles. Each is logged when it comes and when it is over; `on_change` is called then too."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._present: dict[str, str] = {}
        self._clock = clock
        self._since = 0.0
        self._lasted_s = 0.0
        self.on_change: Callable[[], None] = lambda: None

    @property
    def present(self) -> dict[str, str]:
        """Reason by subject."""
        return dict(self._present)

    @property
    def lasted_s(self) -> float:
        """For how many seconds in all there were any, until now."""
        return self._lasted_s + (self._clock() - self._since if self._present else 0.0)

    def found(self, subject: str, reason: str) -> None:
        """`subject` does not work, for `reason`."""
        if self._present.get(subject) == reason:
            return
        if not self._present:
            self._since = self._clock()
        self._present[subject] = reason
        log.warning("in trouble", subject=subject, reason=reason)
        self.on_change()

    def over(self, subject: str) -> None:
        """`subject` works."""
        lasted_s = self.lasted_s
        if self._present.pop(subject, None) is not None:
            self._lasted_s, self._since = lasted_s, self._clock()
            log.info("trouble over", subject=subject)
            self.on_change()
