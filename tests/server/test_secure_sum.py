"""A round's secure sum, led with real clients in one event loop: whoever is lost, late, silent or lies, at whatever step."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeVar

import numpy as np
import pytest
from choral.errors import ChoralError, UpdateRefused
from choral.secagg.masks import Mask
from choral.secagg.roster import Roster
from choral.secagg.shamir import PRIME
from choral.sum_messages import (
    SumAdvert,
    SumRevealed,
    SumRoster,
    SumShares,
    SumSignature,
    SumSignatures,
    SumSurvivors,
    ToSummand,
)
from choral_client.masking import Revealed
from choral_server.masked_sum import BadSum
from choral_server.rounds import Part
from choral_server.secure_sum import SecureSum
from choral_server.unmasking import Unmasking
from e2e.secure_sum import TERMS, People, vectors_of

M = TypeVar("M", bound=ToSummand)
LONG_S, SHORT_S, PATIENCE_S = 600.0, 0.05, 60.0
FIVE = ("alice", "bob", "carol", "dave", "eve")  # of whom four must reveal
SEVEN = (*FIVE, "frank", "grace")  # five
STEPS = ("shares", "result", "signature", "reveal")
DONE = "done"


def id_of(client: str) -> str:
    return f"run/3/{client}"


def parts_of(clients: Iterable[str]) -> list[Part]:
    return [Part(id_of(client), client) for client in clients]


class Led:
    """A secure sum, its clients, and what each hears. `looked` is set whenever it is asked whose transfers move."""

    def __init__(self, *clients: str, quorum: int = 2, step_s: float = LONG_S, longest_s: float = LONG_S, least: int = 2) -> None:
        self.people = People.named(clients)
        self.clients = {name: self.people.masking(name) for name in clients}
        self.vectors = vectors_of(clients)
        self.total = np.zeros(5, np.uint32)
        self.told: dict[str, list[ToSummand]] = {name: [] for name in clients}
        self.over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.advancing: set[str] = set()
        self.looked = asyncio.Event()
        self.fault: Exception | None = None
        self._said = asyncio.Event()
        self.sum = SecureSum(
            Unmasking(TERMS, self.people.vouch, least),
            quorum,
            step_s,
            longest_s,
            self._say,
            self._advancing,
            self._unmask,
            lambda: self.over.set_result(DONE),
            self.over.set_result,
        )

    def _say(self, client: str, message: ToSummand) -> None:
        self.told[client].append(message)
        self._said.set()

    def _advancing(self) -> set[str]:
        self.looked.set()
        return self.advancing

    async def _unmask(self, mask: Mask) -> None:
        if self.fault is not None:
            raise self.fault
        mask.add_to(self.total)

    async def hears(self, client: str, kind: type[M]) -> M:
        """What a client is told last, once it is of this kind."""
        async with asyncio.timeout(PATIENCE_S):
            while not self.told[client] or not isinstance(message := self.told[client][-1], kind):
                self._said.clear()
                await self._said.wait()
        return message

    async def ends(self) -> str:
        """How it ends."""
        return await asyncio.wait_for(self.over, PATIENCE_S)

    async def begun(self) -> None:
        """All have shown their keys, and the sum begins."""
        for client in self.clients:
            self.sum.enter(self.advert(client))
        self.sum.begin(parts_of(self.clients))

    def advert(self, client: str) -> SumAdvert:
        return SumAdvert(id_of(client), self.clients[client].advertise())

    async def shares(self, *clients: str) -> None:
        for client in clients:
            roster = Roster.of(TERMS, (await self.hears(client, SumRoster)).adverts)
            self.sum.take(client, SumShares(id_of(client), self.clients[client].take_roster(roster)))

    async def masked(self, client: str) -> np.ndarray:
        """A client's masked result."""
        vector = self.vectors[client].copy()
        self.clients[client].take_shares((await self.hears(client, SumShares)).sealed).add_to(vector)
        return vector

    async def result(self, *clients: str) -> None:
        for client in clients:
            vector = await self.masked(client)
            self.sum.taking(client)
            self.total += vector
            self.sum.sent(client)

    async def signature(self, *clients: str) -> None:
        for client in clients:
            survivors = (await self.hears(client, SumSurvivors)).clients
            self.sum.take(client, SumSignature(id_of(client), self.clients[client].take_survivors(survivors)))

    async def reveal(self, *clients: str, change: Callable[[Revealed], Revealed] = lambda revealed: revealed) -> None:
        for client in clients:
            revealed = change(self.clients[client].reveal((await self.hears(client, SumSignatures)).signatures))
            self.sum.take(client, SumRevealed(id_of(client), revealed.mask_seeds, revealed.key_seeds))

    async def lead(self, up_to: str = "reveal", *, without: Iterable[str] = (), at: str = "", lost: bool = False) -> None:
        """All steps up to one; `without` these from the step `at` on, who are silent or, if `lost`, known to be gone."""
        await self.begun()
        there = list(self.clients)
        for step in STEPS[: STEPS.index(up_to) + 1]:
            if step == at:
                there = [client for client in there if client not in without]
                if lost:
                    for client in without:
                        self.sum.lost(client)
            await getattr(self, step)(*there)

    def is_sum_of(self, *clients: str) -> bool:
        return bool(np.array_equal(self.total, sum((self.vectors[one] for one in clients), np.zeros(5, np.uint32))))


def wrong(revealed: Revealed) -> Revealed:
    """Shares that are none of anything."""
    return replace(revealed, mask_seeds={one: (2 * share + 1) % PRIME for one, share in revealed.mask_seeds.items()})


# Whoever stays is summed


async def test_a_sum_of_all() -> None:
    led = Led(*FIVE)
    await led.lead()
    assert await led.ends() == DONE
    assert led.is_sum_of(*FIVE)


async def test_each_step_ends_with_the_last_answer_and_no_sooner() -> None:
    led = Led(*FIVE)
    await led.begun()
    expected: list[type[ToSummand]] = [SumRoster]
    for step, after in zip(STEPS, (SumShares, SumSurvivors, SumSignatures, None), strict=True):
        await getattr(led, step)(*FIVE[:3])
        assert {tuple(map(type, told)) for told in led.told.values()} == {tuple(expected)}
        await getattr(led, step)(*FIVE[3:])
        if after is not None:
            expected.append(after)
    assert {tuple(map(type, told)) for told in led.told.values()} == {tuple(expected)}
    assert await led.ends() == DONE


@pytest.mark.parametrize("lost", [True, False])
@pytest.mark.parametrize("at", STEPS)
async def test_who_goes_away_at_a_step_is_left_out_or_summed(at: str, lost: bool) -> None:
    led = Led(*FIVE, step_s=LONG_S if lost else SHORT_S)
    await led.lead(without=["carol"], at=at, lost=lost)
    assert await led.ends() == DONE
    assert led.is_sum_of(*(one for one in FIVE if one != "carol" or at in ("signature", "reveal")))


async def test_nobody_is_told_anything_more_once_lost() -> None:
    led = Led(*FIVE)
    await led.lead(without=["carol"], at="result", lost=True)
    await led.ends()
    assert [type(message) for message in led.told["carol"]] == [SumRoster, SumShares]


async def test_who_has_shown_keys_and_is_not_among_the_parts_takes_no_part() -> None:
    led = Led(*FIVE)
    for client in FIVE:
        led.sum.enter(led.advert(client))
    led.sum.begin(parts_of(FIVE[:3]))
    assert [one.client for one in (await led.hears("alice", SumRoster)).adverts] == ["alice", "bob", "carol"]
    assert led.told["eve"] == []


async def test_who_was_started_again_before_the_sum_begins_shows_other_keys() -> None:
    led = Led(*FIVE)
    for client in FIVE:
        led.sum.enter(led.advert(client))
    led.clients["eve"] = led.people.masking("eve")
    led.sum.enter(again := led.advert("eve"))
    led.sum.begin(parts_of(FIVE))
    assert again.advert in (await led.hears("bob", SumRoster)).adverts
    for step in STEPS:
        await getattr(led, step)(*FIVE)
    assert await led.ends() == DONE
    assert led.is_sum_of(*FIVE)


# Too few


@pytest.mark.parametrize("lost", [True, False])
@pytest.mark.parametrize(
    ("at", "reason"),
    [
        ("shares", "3 of the 5 who hold shares of alice have sent shares; 4 must"),
        ("result", "3 of the 5 who hold shares of alice are left; 4 are needed"),
        ("signature", "3 of the 5 who hold shares of alice are left; 4 are needed"),
        (
            "reveal",
            "3 shares of a secret of alice do not give it back, where 4 that are right would: it has shared something else, or "
            "some who hold its shares lie",
        ),
    ],
)
async def test_if_too_many_go_away_it_comes_to_nothing(at: str, reason: str, lost: bool) -> None:
    led = Led(*FIVE, step_s=LONG_S if lost else SHORT_S)
    await led.lead(up_to=at, without=["carol", "dave"], at=at, lost=lost)
    assert await led.ends() == f"the secure sum came to nothing: {reason}"


async def test_a_quorum_must_be_in_the_sum() -> None:
    led = Led(*FIVE, quorum=5)
    await led.lead("result", without=["carol"], at="result", lost=True)
    assert await led.ends() == "the secure sum came to nothing: 4 results are in the secure sum; the quorum is 5"
    with pytest.raises(UpdateRefused, match=r"the secure sum that .* was in is over"):
        led.sum.expects("carol")


async def test_too_few_have_shown_keys() -> None:
    led = Led(*FIVE, least=3)
    for client in FIVE[:2]:
        led.sum.enter(led.advert(client))
    led.sum.begin(parts_of(FIVE[:2]))
    assert await led.ends() == "the secure sum came to nothing: 2 clients take part in the secure sum; 3 must"
    assert led.told["alice"] == []


@pytest.mark.parametrize(
    ("fault", "told"),
    [(BadSum("it cannot be"), "it cannot be"), (RuntimeError("no memory"), "RuntimeError: no memory")],
)
async def test_a_sum_that_cannot_be_used_is_told(fault: Exception, told: str) -> None:
    led = Led(*FIVE)
    led.fault = fault
    await led.lead()
    assert await led.ends() == f"the secure sum came to nothing: {told}"


# Results


async def test_a_result_is_expected_only_while_results_are() -> None:
    led = Led(*FIVE)
    with pytest.raises(UpdateRefused, match="no masked result of alice is waited for yet, but keys"):
        led.sum.expects("alice")
    await led.lead("shares")
    led.sum.expects("alice")
    with pytest.raises(UpdateRefused, match="the secure sum has gone on without mallory"):
        led.sum.expects("mallory")
    led.sum.lost("alice")
    with pytest.raises(UpdateRefused, match="the secure sum has gone on without alice"):
        led.sum.taking("alice")


async def test_a_result_that_is_being_stored_when_time_is_up_is_in_the_sum() -> None:
    led = Led(*FIVE, step_s=SHORT_S)
    await led.lead("shares")
    await led.result(*FIVE[:3])
    led.total += await led.masked("eve")
    led.sum.taking("eve")
    await led.looked.wait()
    led.sum.lost("eve")  # it has done its part
    led.sum.sent("eve")
    there = ("alice", "bob", "carol", "eve")
    assert (await led.hears("eve", SumSurvivors)).clients == there
    await led.signature(*there)
    await led.reveal(*there)
    assert await led.ends() == DONE
    assert led.is_sum_of(*there)


async def test_a_result_that_was_not_stored_is_not_waited_for_when_time_is_up() -> None:
    led = Led(*FIVE, step_s=SHORT_S)
    await led.lead("shares")
    led.sum.taking("eve")
    await led.result(*FIVE[:4])
    await led.looked.wait()
    led.sum.not_taken("eve")
    assert (await led.hears("alice", SumSurvivors)).clients == FIVE[:4]


async def test_a_result_that_was_not_stored_is_not_waited_for_at_all() -> None:
    led = Led(*FIVE)
    await led.lead("shares")
    led.sum.taking("eve")
    await led.result(*FIVE[:4])
    led.sum.lost("eve")  # it has declined meanwhile, which is why its result does not count
    led.sum.not_taken("eve")
    assert (await led.hears("alice", SumSurvivors)).clients == FIVE[:4]


async def test_a_result_that_comes_twice_costs_its_client_nothing() -> None:
    led = Led(*FIVE)
    await led.lead("shares")
    await led.result("alice")
    led.sum.taking("alice")
    await led.result(*FIVE[1:])
    led.sum.not_taken("alice")
    await led.signature(*FIVE)
    await led.reveal(*FIVE)
    assert await led.ends() == DONE
    assert led.is_sum_of(*FIVE)


async def test_an_upload_that_advances_is_waited_for() -> None:
    led = Led(*FIVE, step_s=SHORT_S)
    await led.lead("shares")
    await led.result(*FIVE[:4])
    led.advancing = {"eve"}
    for _ in range(2):
        led.looked.clear()
        await led.looked.wait()
    await led.result("eve")
    assert (await led.hears("alice", SumSurvivors)).clients == FIVE


async def test_but_not_for_ever() -> None:
    led = Led(*FIVE, step_s=SHORT_S, longest_s=SHORT_S / 2)
    await led.lead("shares")
    await led.result(*FIVE[:4])
    led.advancing = {"eve"}
    assert (await led.hears("alice", SumSurvivors)).clients == FIVE[:4]


# What is revealed


async def test_wrong_shares_are_outvoted_once_enough_are_there() -> None:
    led = Led(*SEVEN)
    await led.lead("signature")
    await led.reveal("alice", change=wrong)
    await led.reveal(*SEVEN[1:5])
    trying = led.sum._trying
    assert trying is not None, "five of seven might do"
    await asyncio.wait([trying])
    assert not led.over.done()
    await led.reveal(*SEVEN[5:])
    assert await led.ends() == DONE
    assert led.is_sum_of(*SEVEN)


async def test_what_is_revealed_while_it_is_tried_counts() -> None:
    led = Led(*SEVEN)
    await led.lead("signature")
    await led.reveal("alice", change=wrong)
    await led.reveal(*SEVEN[1:])  # the first try has not begun by the time that the last is here
    assert await led.ends() == DONE
    assert led.is_sum_of(*SEVEN)


async def test_nonsense_revealed_while_it_is_tried_is_passed_over() -> None:
    led = Led(*SEVEN)
    await led.lead("signature")
    await led.reveal("alice", change=wrong)
    await led.reveal(*SEVEN[1:5])
    await led.reveal("frank", change=lambda revealed: replace(revealed, key_seeds={"bob": 1}))
    await led.reveal("grace")
    assert await led.ends() == DONE  # with the five that are right
    assert led.is_sum_of(*SEVEN)


async def test_too_many_wrong_shares_leave_nothing() -> None:
    led = Led(*SEVEN)
    await led.lead("signature")
    await led.reveal("alice", "bob", "carol", change=wrong)
    await led.reveal(*SEVEN[3:])
    assert (await led.ends()).startswith("the secure sum came to nothing: 7 shares of a secret of alice do not give it back")


async def test_wrong_shares_are_no_end_before_time_is_up() -> None:
    led = Led(*SEVEN, step_s=SHORT_S)
    await led.lead("signature")
    await led.reveal("alice", change=wrong)
    await led.reveal(*SEVEN[1:5])
    assert (await led.ends()).startswith("the secure sum came to nothing: 5 shares of a secret of alice do not give it back")


# What comes again


async def test_who_was_away_is_reminded_of_what_it_has_not_answered() -> None:
    led = Led(*FIVE)
    led.sum.remind("alice")
    assert led.told["alice"] == []
    await led.begun()
    led.sum.remind("alice")
    assert led.told["alice"] == [SumRoster(id_of("alice"), led.told["bob"][0].adverts)] * 2  # type: ignore[union-attr]
    await led.shares("alice")
    led.sum.remind("alice")
    assert len(led.told["alice"]) == 2
    led.sum.remind("mallory")
    led.sum.lost("bob")
    led.sum.remind("bob")
    assert len(led.told["bob"]) == 1


async def test_what_is_said_again_does_no_harm() -> None:
    led = Led(*FIVE)
    adverts = {client: led.advert(client) for client in FIVE}
    for client in FIVE:
        led.sum.enter(adverts[client])
        led.sum.enter(adverts[client])
    led.sum.begin(parts_of(FIVE))
    led.sum.enter(adverts["alice"])
    words: list[tuple[str, SumShares | SumSignature | SumRevealed]] = []
    take = led.sum.take

    def twice(client: str, said: SumShares | SumSignature | SumRevealed) -> None:
        words.append((client, said))
        for one in words:  # all that was ever said
            take(*one)

    led.sum.take = twice  # type: ignore[method-assign, assignment]
    for step in STEPS:
        await getattr(led, step)(*FIVE)
    assert await led.ends() == DONE
    assert led.is_sum_of(*FIVE)


async def test_other_keys_are_refused_once_it_has_begun() -> None:
    led = Led(*FIVE)
    await led.begun()
    led.clients["eve"] = led.people.masking("eve")
    with pytest.raises(UpdateRefused, match="has begun with the keys that were shown by then: this client has lost those"):
        led.sum.enter(led.advert("eve"))


async def test_what_cannot_be_right_is_refused_and_awaited_still() -> None:
    led = Led(*FIVE)
    await led.begun()
    with pytest.raises(UpdateRefused, match="alice sends shares for 0 of its 4 neighbours"):
        led.sum.take("alice", SumShares(id_of("alice"), {}))
    await led.shares(*FIVE)
    await led.result(*FIVE)
    with pytest.raises(UpdateRefused, match="bob has not signed who has sent a masked update"):
        led.sum.take("bob", SumSignature(id_of("bob"), bytes(64)))
    await led.signature(*FIVE)
    with pytest.raises(UpdateRefused, match="carol reveals shares of others than it was asked for"):
        led.sum.take("carol", SumRevealed(id_of("carol"), {"mallory": 1}, {}))
    await led.reveal(*FIVE)
    assert await led.ends() == DONE


async def test_after_the_end_nothing_happens() -> None:
    led = Led(*FIVE, step_s=SHORT_S)
    await led.lead("shares")
    led.sum.end()
    led.sum.lost("alice")
    led.sum.sent("bob")
    led.sum.take("carol", SumSignature(id_of("carol"), b""))
    with pytest.raises(UpdateRefused, match=r"the secure sum that .* was in is over"):
        led.sum.expects("dave")
    assert not led.over.done()
    assert all(len(told) == 2 for told in led.told.values())


def test_a_bad_sum_is_an_error_of_ours() -> None:
    assert issubclass(BadSum, ChoralError)
