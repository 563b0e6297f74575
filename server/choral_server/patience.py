"""Work that waits until what it needs is back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from choral.errors import ArtifactsGone, DatabaseGone

from choral_server.troubles import Troubles

T = TypeVar("T")
_BACKOFF_S = (0.1, 5.0)  # first and longest wait between two attempts
STORES = (ArtifactsGone, DatabaseGone, OSError)


async def patiently(
    troubles: Troubles, subject: str, work: Callable[[], Awaitable[T]], gone: tuple[type[Exception], ...] = STORES
) -> T:
    """The result of `work`, tried until what it needs answers (else it raises one of `gone`); meanwhile `subject` is in trouble."""
    pause_s, longest_s = _BACKOFF_S
    while True:
        try:
            result = await work()
        except gone as error:
            troubles.found(subject, str(error))
        else:
            troubles.over(subject)
            return result
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, longest_s)
