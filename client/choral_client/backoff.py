"""How long to wait before trying again."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress

BASE_S = 0.5
CAP_S = 60.0


def full_jitter(attempt: int, rng: random.Random, cap_s: float = CAP_S) -> float:
    """Seconds before attempt `attempt` (1 is the first retry): uniform in [0, min(cap, base · 2^attempt)].

    Full jitter spreads clients that lost the same coordinator at the same moment (Brooker, "Exponential backoff and jitter", 2015).
    """
    return rng.uniform(0.0, min(cap_s, BASE_S * 2.0 ** min(attempt, 32)))


class Patience:
    """The pauses of everything that waits for the link: they end early, all at once, when it is back."""

    def __init__(self, rng: random.Random, cap_s: float = CAP_S) -> None:
        self._rng = rng
        self._cap_s = cap_s
        self._back = asyncio.Event()

    async def pause(self, attempt: int) -> None:
        """Wait as long as before attempt `attempt`, or until the link is back."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._back.wait(), full_jitter(attempt, self._rng, self._cap_s))

    def link_is_back(self) -> None:
        """End the pauses that there are."""
        self._back.set()
        self._back = asyncio.Event()
