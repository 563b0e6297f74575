"""A client's part in a secure sum: in which order it says what, its answer to what comes again, and what it takes for a lie."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TypeVar

import numpy as np
import pytest
from choral.errors import Deceived
from choral.secagg.masks import Mask
from choral.sum_messages import (
    FromSummand,
    SumAdvert,
    SumRevealed,
    SumRoster,
    SumShares,
    SumSignature,
    SumSignatures,
    SumSurvivors,
)
from choral_client.sum_part import SumPart
from choral_server.unmasking import Unmasking
from e2e.secure_sum import TERMS, People, vectors_of

M = TypeVar("M", bound=FromSummand)
PATIENCE_S = 60.0
ID, OTHERS, NAMES = "run/3/alice", ("bob", "carol"), ("alice", "bob", "carol")


class Led:
    """Alice's part; a coordinator leads it with two others. `said` is what she has said."""

    def __init__(self) -> None:
        people = People.named(NAMES)
        self.said: list[FromSummand] = []
        self._spoke = asyncio.Event()
        self.part = SumPart(ID, TERMS, people.masking("alice"), self._say)
        self.others = {name: people.masking(name) for name in OTHERS}
        self.coordinator = Unmasking(TERMS, people.vouch, 2)
        self.vectors = vectors_of(NAMES)
        self.sent = {name: vector.copy() for name, vector in self.vectors.items()}

    async def _say(self, word: FromSummand) -> None:
        self.said.append(word)
        self._spoke.set()

    async def says(self, number: int, kind: type[M]) -> M:
        """What she says as the `number`-th word, from 1 on."""
        async with asyncio.timeout(PATIENCE_S):
            while len(self.said) < number:
                self._spoke.clear()
                await self._spoke.wait()
        word = self.said[number - 1]
        assert isinstance(word, kind)
        return word

    async def roster(self) -> SumRoster:
        """What she is told after her advert, as the coordinator has it."""
        self.coordinator.take_advert((await self.says(1, SumAdvert)).advert)
        for masking in self.others.values():
            self.coordinator.take_advert(masking.advertise())
        return SumRoster(ID, self.coordinator.close_adverts().adverts)

    async def shares(self, number: int = 2) -> SumShares:
        """The same after her shares."""
        self.coordinator.take_shares("alice", (await self.says(number, SumShares)).sealed)
        for name, masking in self.others.items():
            self.coordinator.take_shares(name, masking.take_roster(self.coordinator.roster))
        for name, masking in self.others.items():
            masking.take_shares(self.coordinator.shares_for(name)).add_to(self.sent[name])
        return SumShares(ID, self.coordinator.shares_for("alice"))

    def survivors(self) -> SumSurvivors:
        return SumSurvivors(ID, self.coordinator.close(NAMES))

    async def signatures(self, number: int = 3) -> SumSignatures:
        self.coordinator.take_signature("alice", (await self.says(number, SumSignature)).signature)
        for name, masking in self.others.items():
            self.coordinator.take_signature(name, masking.take_survivors(self.coordinator.survivors))
        return SumSignatures(ID, self.coordinator.signatures_for("alice"))

    async def unmasked(self, number: int = 4) -> np.ndarray:
        revealed = await self.says(number, SumRevealed)
        self.coordinator.take_revealed("alice", revealed.mask_seeds, revealed.key_seeds)
        for name, masking in self.others.items():
            shares = masking.reveal(self.coordinator.signatures_for(name))
            self.coordinator.take_revealed(name, shares.mask_seeds, shares.key_seeds)
        total = sum(self.sent.values(), np.zeros(5, np.uint32))
        self.coordinator.mask().add_to(total)
        return total

    async def masked(self) -> tuple[SumRoster, SumShares]:
        """Her part up to her masked result; what she was told."""
        masking = asyncio.create_task(self.part.masked())
        await self.part.hear(roster := await self.roster())
        await self.part.hear(shares := await self.shares())
        (await within(masking)).add_to(self.sent["alice"])
        return roster, shares


async def within(task: asyncio.Task[Mask]) -> Mask:
    return await asyncio.wait_for(task, PATIENCE_S)


async def test_from_the_first_word_to_the_last() -> None:
    led = Led()
    await led.masked()
    assert not np.array_equal(led.sent["alice"], led.vectors["alice"])
    revealing = asyncio.create_task(led.part.reveal())
    await led.part.hear(led.survivors())
    await led.part.hear(await led.signatures())
    await asyncio.wait_for(revealing, PATIENCE_S)
    assert np.array_equal(await led.unmasked(), sum(led.vectors.values(), np.zeros(5, np.uint32)))
    assert [type(word) for word in led.said] == [SumAdvert, SumShares, SumSignature, SumRevealed]
    assert {word.assignment for word in led.said} == {ID}


async def test_what_is_heard_before_its_turn_waits() -> None:
    """Others may be faster: the survivors are told while this client's own result is still being answered."""
    led = Led()
    await led.masked()
    await led.part.hear(led.survivors())
    revealing = asyncio.create_task(led.part.reveal())
    await led.part.hear(await led.signatures())
    await asyncio.wait_for(revealing, PATIENCE_S)
    assert isinstance(led.said[-1], SumRevealed)


async def test_the_same_again_is_answered_by_the_last_word_again() -> None:
    led = Led()
    masking = asyncio.create_task(led.part.masked())
    await led.part.hear(roster := await led.roster())
    await led.says(2, SumShares)
    await led.part.hear(roster)
    again = await led.says(3, SumShares)
    assert again == led.said[1]
    await led.part.hear(shares := await led.shares())
    await within(masking)
    revealing = asyncio.create_task(led.part.reveal())
    await led.part.hear(shares)
    await led.part.hear(roster)
    assert await led.says(4, SumShares) == await led.says(5, SumShares) == again
    await led.part.hear(led.survivors())
    await led.part.hear(await led.signatures(6))
    await asyncio.wait_for(revealing, PATIENCE_S)
    assert [type(word) for word in led.said[5:]] == [SumSignature, SumRevealed]


async def test_the_last_word_is_said_again_when_the_link_is_back() -> None:
    led = Led()
    await led.part.repeat()
    assert led.said == []
    masking = asyncio.create_task(led.part.masked())
    first = await led.says(1, SumAdvert)
    await led.part.repeat()
    assert led.said == [first, first]
    masking.cancel()


async def test_other_keys_than_before_are_a_lie() -> None:
    led = Led()
    masking = asyncio.create_task(led.part.masked())
    await led.part.hear(roster := await led.roster())
    await led.says(2, SumShares)
    await led.part.hear(replace(roster, adverts=roster.adverts[:2]))
    told = "the coordinator tells this client who takes part in the secure sum again, and not the same as before"
    with pytest.raises(Deceived, match=f"^{told}$"):
        await within(masking)
    assert len(led.said) == 2
    with pytest.raises(Deceived, match="after its last word"):  # the secrets are gone
        await led.part.masked()


async def test_other_survivors_than_before_are_a_lie() -> None:
    led = Led()
    await led.masked()
    revealing = asyncio.create_task(led.part.reveal())
    await led.part.hear(survivors := led.survivors())
    await led.says(3, SumSignature)
    await led.part.hear(replace(survivors, clients=NAMES[:2]))
    with pytest.raises(Deceived, match="tells this client who survives again, and not the same as before"):
        await asyncio.wait_for(revealing, PATIENCE_S)
    assert not any(isinstance(word, SumRevealed) for word in led.said)


@pytest.mark.parametrize(
    ("early", "what"),
    [
        (SumShares(ID, {}), "the shares of others' secrets"),
        (SumSurvivors(ID, NAMES), "who survives"),
        (SumSignatures(ID, {}), "what the others have signed"),
    ],
)
async def test_a_step_that_is_left_out_is_a_lie(early: SumShares | SumSurvivors | SumSignatures, what: str) -> None:
    led = Led()
    await led.part.hear(early)
    with pytest.raises(
        Deceived, match=f"^the coordinator tells this client {what}, where who takes part in the secure sum is next$"
    ):
        await led.part.masked()
    assert [type(word) for word in led.said] == [SumAdvert]


async def test_signatures_before_survivors_are_a_lie() -> None:
    led = Led()
    await led.masked()
    await led.part.hear(SumSignatures(ID, {}))
    with pytest.raises(Deceived, match="tells this client what the others have signed, where who survives is next"):
        await led.part.reveal()
    assert len(led.said) == 2


async def test_reminders_while_it_is_busy_take_no_room_from_what_follows() -> None:
    """A link that breaks again and again during a long upload: each time the coordinator says again what it said last."""
    led = Led()
    _, shares = await led.masked()
    for _ in range(100):
        await led.part.hear(shares)
    await led.part.hear(led.survivors())
    revealing = asyncio.create_task(led.part.reveal())
    await led.part.hear(await led.signatures(103))
    await asyncio.wait_for(revealing, PATIENCE_S)
    assert [type(word) for word in led.said[2:]] == [*[SumShares] * 100, SumSignature, SumRevealed]


async def test_of_a_coordinator_that_talks_without_end_little_is_kept() -> None:
    led = Led()
    for number in range(1000):
        await led.part.hear(SumSurvivors(ID, (f"client-{number}",)))
    assert len(led.part._unread) == 16
    with pytest.raises(Deceived, match="where who takes part in the secure sum is next"):
        await led.part.masked()


async def test_who_asks_again_after_the_last_word_gets_the_same_and_who_asks_anew_nothing() -> None:
    led = Led()
    await led.masked()
    revealing = asyncio.create_task(led.part.reveal())
    await led.part.hear(survivors := led.survivors())
    await led.part.hear(signatures := await led.signatures())
    await asyncio.wait_for(revealing, PATIENCE_S)
    led.part.end()
    await led.part.hear(signatures)
    assert led.said[-1] == led.said[-2]
    with pytest.raises(Deceived, match="who survives when it has revealed what it held, which it does once"):
        await led.part.hear(replace(survivors, clients=NAMES[:2]))
    assert len(led.said) == 5


async def test_at_the_end_the_secrets_are_gone() -> None:
    led = Led()
    await led.masked()
    led.part.end()
    await led.part.hear(led.survivors())
    with pytest.raises(Deceived, match="after its last word"):
        await led.part.reveal()
    assert len(led.said) == 2
