"""Whose transfers advance."""

from __future__ import annotations

import time
from collections.abc import Callable


class Transfers:
    """When each client's download or upload last moved, by a monotonic clock in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._moved: dict[str, float] = {}

    def moved(self, client: str) -> None:
        """A piece of a transfer from or to this client has arrived or been taken."""
        self._moved[client] = self._clock()

    def ended(self, client: str) -> None:
        """It is over, one way or the other."""
        self._moved.pop(client, None)

    def advancing(self, within_s: float) -> frozenset[str]:
        """The clients of which something moved in the last `within_s` seconds."""
        now = self._clock()
        return frozenset(client for client, moved in self._moved.items() if now - moved <= within_s)
