"""Transfers under way: so many at a time that memory holds them, and which of them advance."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

_MOST_BYTES = 8 << 20  # what the fastest transfer may have in memory: some chunks here, some in gRPC, some being written
_LEAST_BYTES = 1 << 18
_SPAN_S = 0.25


class Transfer:
    """One upload or download, of which at most `most_bytes` are in memory; `moved_at` is by `clock`, in seconds."""

    def __init__(self, client: str, most_bytes: int, clock: Callable[[], float]) -> None:
        self.client = client
        self.moved_at = -math.inf
        self._most_bytes = most_bytes
        self._clock = clock
        self._span_at = clock()
        self._before = most_bytes  # bytes in the span of time before this one: it begins as one of the fastest
        self._lately = 0

    def moved(self, count: int) -> None:
        """So many bytes have arrived or been taken."""
        self.moved_at = self._clock()
        self._turn_span()
        self._lately += count

    def reserved(self) -> int:
        """The bytes of memory that it may need: of one that is slow, little is here at a time."""
        self._turn_span()
        return min(self._most_bytes, max(_LEAST_BYTES, self._lately, self._before))

    def _turn_span(self) -> None:
        passed_s = self._clock() - self._span_at
        if passed_s >= _SPAN_S:
            self._before = self._lately  # however long ago: if nothing was looked at meanwhile, it may be we who stood still
            self._lately, self._span_at = 0, self._clock()


class Transfers:
    """Admits transfers in the order in which they come, as long as they together need no more than `budget_bytes` of memory.

    A transfer counts with what it moved in the last quarter of a second, at most 8 MiB or a quarter of the budget: four that are as
    fast as we are, or many slow ones.
    """

    def __init__(self, budget_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._budget_bytes = budget_bytes
        self._most_bytes = max(_LEAST_BYTES, min(_MOST_BYTES, budget_bytes // 4))
        self._clock = clock
        self._open: set[Transfer] = set()
        self._waiting: deque[tuple[str, asyncio.Event]] = deque()

    @asynccontextmanager
    async def turn(self, client: str, size_bytes: int) -> AsyncIterator[Transfer]:
        """Wait for the turn of a transfer of so many bytes; it is under way until the context is left."""
        await self._admitted(client, size_bytes)
        transfer = self.begin(client, size_bytes)
        try:
            yield transfer
        finally:
            self.end(transfer)

    def begin(self, client: str, size_bytes: int) -> Transfer:
        """A transfer is under way, whether there is room or not."""
        transfer = Transfer(client, min(size_bytes, self._most_bytes), self._clock)
        self._open.add(transfer)
        return transfer

    def end(self, transfer: Transfer) -> None:
        """It is over, one way or the other."""
        self._open.remove(transfer)
        self._call_next()

    def advancing(self, within_s: float) -> frozenset[str]:
        """The clients of which something moved in the last `within_s` seconds, or which wait for us."""
        now = self._clock()
        moving = {transfer.client for transfer in self._open if now - transfer.moved_at <= within_s}
        return frozenset(moving | {client for client, _ in self._waiting})

    async def _admitted(self, client: str, size_bytes: int) -> None:
        """Wait behind those who came before until there is room, as there is also when transfers grow slow."""
        me = client, asyncio.Event()
        self._waiting.append(me)
        try:
            while self._waiting[0] is not me or not self._has_room(size_bytes):
                me[1].clear()
                first = self._waiting[0] is me  # who is not is called when it is
                with suppress(TimeoutError):
                    async with asyncio.timeout(_SPAN_S if first else None):
                        await me[1].wait()
        finally:
            self._waiting.remove(me)
            self._call_next()

    def _has_room(self, size_bytes: int) -> bool:
        reserved = sum(transfer.reserved() for transfer in self._open)
        return not self._open or reserved + min(size_bytes, self._most_bytes) <= self._budget_bytes

    def _call_next(self) -> None:
        if self._waiting:
            self._waiting[0][1].set()
