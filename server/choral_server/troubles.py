"""What keeps the coordinator from going on at present, by subject: a database that is gone, a disk that is full."""

from __future__ import annotations

from collections.abc import Callable

import structlog

log = structlog.get_logger()


class Troubles:
    """The present troubles. Each is logged when it comes and when it is over; `on_change` is called then too."""

    def __init__(self) -> None:
        self._present: dict[str, str] = {}
        self.on_change: Callable[[], None] = lambda: None

    @property
    def present(self) -> dict[str, str]:
        """Reason by subject."""
        return dict(self._present)

    def found(self, subject: str, reason: str) -> None:
        """`subject` does not work, for `reason`."""
        if self._present.get(subject) == reason:
            return
        self._present[subject] = reason
        log.warning("in trouble", subject=subject, reason=reason)
        self.on_change()

    def over(self, subject: str) -> None:
        """`subject` works."""
        if self._present.pop(subject, None) is not None:
            log.info("trouble over", subject=subject)
            self.on_change()
