"""One client's part in one secure sum: what it says, and waits to hear, from its finished work to the last share.

The steps are `sum_messages`; what must be seen before each is `masking`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from choral.errors import Deceived
from choral.secagg.masks import Mask
from choral.secagg.roster import Roster, Terms
from choral.sum_messages import (
    FromSummand,
    SumAdvert,
    SumRevealed,
    SumRoster,
    SumShares,
    SumSignature,
    SumSignatures,
    SumSurvivors,
    ToSummand,
)

from choral_client.masking import Masking

_UNREAD = 16  # messages of a coordinator that says more than is asked for
M = TypeVar("M", bound=ToSummand)


class SumPart:
    """Leads `masking` through its steps. `say` tells the coordinator, and may find no link: `repeat` says the last word again."""

    def __init__(self, assignment: str, terms: Terms, masking: Masking, say: Callable[[FromSummand], Awaitable[None]]) -> None:
        self.assignment = assignment
        self._terms = terms
        self._masking = masking
        self._say_it = say
        self._unread: list[ToSummand] = []
        self._news = asyncio.Event()
        self._heard: dict[type[Any], ToSummand] = {}
        self._last: FromSummand | None = None
        self._revealed = False

    async def hear(self, message: ToSummand) -> None:
        """The coordinator says something; what comes again is not kept. Raises Deceived: something new, when all is said."""
        if message == self._heard.get(type(message)):
            await self.repeat()  # who says it again has not heard the answer
        elif self._revealed:
            told = _TOLD[type(message)]
            raise Deceived(f"the coordinator tells this client {told} when it has revealed what it held, which it does once")
        elif message not in self._unread and len(self._unread) < _UNREAD:
            self._unread.append(message)
            self._news.set()

    async def repeat(self) -> None:
        """Say the last word again: the link was broken, and it may not have been heard."""
        if self._last is not None:
            await self._say_it(self._last)

    async def masked(self) -> Mask:
        """Take part, up to the mask for this client's result. Raises Deceived."""
        await self._say(SumAdvert(self.assignment, self._masking.advertise()))
        roster = Roster.of(self._terms, (await self._next(SumRoster)).adverts)
        await self._say(SumShares(self.assignment, await asyncio.to_thread(self._masking.take_roster, roster)))
        shares = await self._next(SumShares)
        return await asyncio.to_thread(self._masking.take_shares, shares.sealed)

    async def reveal(self) -> None:
        """Say what takes off what is left of the masks, once the masked result is in the sum. Raises Deceived."""
        survivors = await self._next(SumSurvivors)
        await self._say(SumSignature(self.assignment, self._masking.take_survivors(survivors.clients)))
        signatures = await self._next(SumSignatures)
        revealed = await asyncio.to_thread(self._masking.reveal, signatures.signatures)
        self._revealed = True
        await self._say(SumRevealed(self.assignment, revealed.mask_seeds, revealed.key_seeds))

    def end(self) -> None:
        """Forget the secrets."""
        self._masking.end()

    async def _say(self, word: FromSummand) -> None:
        self._last = word
        await self._say_it(word)

    async def _next(self, kind: type[M]) -> M:
        """The next message, which must be of this kind."""
        while not self._unread:
            self._news.clear()
            await self._news.wait()
        message = self._unread.pop(0)
        if not isinstance(message, kind):
            self._masking.end()
            raise Deceived(_out_of_order(message, kind, type(message) in self._heard))
        self._heard[kind] = message
        return message


def _out_of_order(message: ToSummand, expected: type[Any], again: bool) -> str:
    told = _TOLD[type(message)]
    if again:
        return f"the coordinator tells this client {told} again, and not the same as before"
    return f"the coordinator tells this client {told}, where {_TOLD[expected]} is next"


_TOLD: dict[type[Any], str] = {
    SumRoster: "who takes part in the secure sum",
    SumShares: "the shares of others' secrets",
    SumSurvivors: "who survives",
    SumSignatures: "what the others have signed",
}
