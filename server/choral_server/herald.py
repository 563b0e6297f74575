"""Tells everyone who attends of the newest version, a few at a time: announcements of work and receipts go in between."""

from __future__ import annotations

import asyncio
from itertools import islice

from choral.messages import NewVersion, VersionRef

from choral_server.sessions import Sessions

_AT_ONCE = 50  # clients
_PAUSE_S = 0.05


class Herald:
    """Keeps who has not been told yet. Of a version that a newer one overtakes they do not hear."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._untold: dict[str, None] = {}
        self._newest: NewVersion | None = None
        self._timer: asyncio.TimerHandle | None = None

    def proclaim(self, version: VersionRef) -> None:
        """There is a new version: tell the first ones now, and the others soon."""
        self._newest = NewVersion(version)
        self._untold |= dict.fromkeys(self._sessions.present())
        if self._timer is None:
            self._go_on()

    def finish(self) -> None:
        """Tell all others now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._tell(len(self._untold))

    def _go_on(self) -> None:
        self._tell(_AT_ONCE)
        self._timer = asyncio.get_running_loop().call_later(_PAUSE_S, self._go_on) if self._untold else None

    def _tell(self, count: int) -> None:
        if self._newest is None:
            return
        for client in tuple(islice(self._untold, count)):
            del self._untold[client]
            self._sessions.say(client, self._newest)
