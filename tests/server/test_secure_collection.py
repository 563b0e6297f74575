"""A round that is summed securely, over a real database and a real spool, with clients that mask their results."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from choral.codecs import MASKED
from choral.errors import UpdateRefused
from choral.messages import Assignment, Cancel, Phase, Status, UploadHeader, Verdict
from choral.plan import Kind, digest_of
from choral.secagg.masks import Mask
from choral.secagg.roster import Advert, Roster, Terms
from choral.sum_messages import SumAdvert, SumRevealed, SumRoster, SumShares, SumSignature, SumSignatures, SumSurvivors
from choral_client import contribution
from choral_client.masking import Masking
from choral_server.collection import Collection
from choral_server.masked_sum import MaskedSum
from choral_server.rounds import Part, PartState, Round, RoundState, Upload
from e2e.secure_sum import People
from server.home import NOON, Home, home
from server.test_collection import CHANGE, LONG_S, Floor, floor, states

__all__ = ["home"]

CLIENTS = ("alice", "bob", "carol", "dave", "eve")
PATIENCE_S = 60.0


class Device:
    """A client that is asked; it has `examples`, and what it trains is `change`."""

    def __init__(self, here: Floor, collection: Collection, people: People, name: str, examples: int = 10) -> None:
        self.name = name
        self._here = here
        self._collection = collection
        self._people = people
        self._examples = examples
        self._asked: Assignment
        self._masking: Masking

    async def ready(self) -> None:
        """It has done its work, and shows its keys."""
        self._asked = await self._here.hears(self.name, Assignment)
        secure = self._asked.plan.secure
        assert secure is not None
        digest = digest_of(self._asked.plan)
        self._terms = Terms(secure.run, self._asked.round, self._asked.version.digest, digest, secure.threshold)
        self._masking = self._people.masking(self.name, 2, self._terms)
        self._collection.said(self.name, SumAdvert(self._asked.id, self._masking.advertise()))

    async def shares(self) -> Mask:
        """It looks at who takes part, and shares its secrets; the mask."""
        roster = Roster.of(self._terms, (await self._here.hears(self.name, SumRoster)).adverts)
        self._collection.said(self.name, SumShares(self._asked.id, self._masking.take_roster(roster)))
        return self._masking.take_shares((await self._here.hears(self.name, SumShares)).sealed)

    async def sends(self, mask: Mask) -> Verdict:
        """Its masked result."""
        plan = self._asked.plan
        assert plan.secure is not None
        layout = self._here.run.layout(plan)
        summand = contribution.of_update(lambda: iter([CHANGE]), layout, plan.secure, self._examples, ())
        summand.add_mask(mask)
        content = b"".join(summand.pieces())
        digest = hashlib.sha256(content).digest()
        header = UploadHeader(self._asked.id, self.name, 0, Kind.TRAINING, len(content), (), (), digest, codec=MASKED)
        assert self._collection.expects(header) is None

        async def pieces() -> AsyncIterator[bytes]:
            yield content

        path = await self._collection.spool.store(header, pieces())
        return (await self._collection.submit(Upload(header.assignment, self.name, 0, (), (), digest, path))).verdict

    async def reveals(self) -> None:
        """It signs who survives, and reveals what takes off the masks."""
        survivors = (await self._here.hears(self.name, SumSurvivors)).clients
        self._collection.said(self.name, SumSignature(self._asked.id, self._masking.take_survivors(survivors)))
        revealed = self._masking.reveal((await self._here.hears(self.name, SumSignatures)).signatures)
        self._collection.said(self.name, SumRevealed(self._asked.id, revealed.mask_seeds, revealed.key_seeds))

    async def sums_up(self) -> None:
        """All that comes after its keys."""
        async with asyncio.timeout(PATIENCE_S):
            assert await self.sends(await self.shares()) is Verdict.ACCEPTED
            await self.reveals()

    def other_keys(self) -> Advert:
        """What it might show as well."""
        return self._people.masking(self.name, 2, self._terms).advertise()

    def declines(self, reason: str = "on battery") -> None:
        """It will not go on."""
        self._collection.reported(self.name, Status(self._asked.id, Phase.DECLINED, reason))


class Secure:
    """A secure round of `asked` clients, under way; of them `goal` must be ready."""

    def __init__(self, here: Floor, collection: Collection, examples: dict[str, int]) -> None:
        self.here = here
        self.collection = collection
        people = People.named(CLIENTS)
        self.devices = {name: Device(here, collection, people, name, examples.get(name, 10)) for name in CLIENTS}
        self._collecting = here.begin(collection)

    async def taken(self, client: str) -> None:
        """Once the round knows that it is ready."""
        while self.collection.round.parts[self.here.id_of(client)].state is not PartState.READY:
            await asyncio.sleep(0)  # a turn of the loop, which needs nothing else for it

    async def closed(self) -> Round:
        return await asyncio.wait_for(self._collecting, PATIENCE_S)


async def secure_round(
    home: Home, *asked: str, goal: int = 3, quorum: int = 3, examples: dict[str, int] | None = None, **settings: Any
) -> Secure:
    here = await floor(home, cohort_size=goal, secure_aggregation={"step_s": LONG_S}, weight_cap=16, **settings)
    here.join(*CLIENTS)
    record, version = here.run.record, here.run.version
    parts = {here.id_of(client): Part(here.id_of(client), client, codec=MASKED) for client in asked}
    opened = Round(record.name, 0, Kind.TRAINING, 0, goal, quorum, parts, NOON, parent=version.digest)
    await home.store.commit(opened)
    return Secure(here, here.taken_up(opened), examples or {})


def asked(secure: Secure, client: str) -> list[str]:
    """The assignments that wait for a client."""
    return [said.id for said in secure.here.open[client].outbox if isinstance(said, Assignment)]


async def test_a_secure_round_and_nobody_is_asked_beside_those_who_are_enough(home: Home) -> None:
    secure = await secure_round(home, "alice", "bob", "carol", examples={"alice": 3, "bob": 40})
    for name in ("alice", "bob", "carol"):
        await secure.devices[name].ready()
        await secure.taken(name)
    await asyncio.gather(*(secure.devices[name].sums_up() for name in ("alice", "bob", "carol")))
    closed = await secure.closed()
    assert closed.state is RoundState.CLOSED
    assert states(closed) == {"alice": "accepted", "bob": "accepted", "carol": "accepted"}
    assert {(part.examples, part.held_out, part.work) for part in closed.parts.values()} == {(0, (), ())}
    aggregate = secure.collection.tally.aggregate
    assert isinstance(aggregate, MaskedSum)
    assert aggregate.mean() == pytest.approx(CHANGE, abs=1e-5)
    assert asked(secure, "dave") == asked(secure, "eve") == []
    assert not list(home.folder.glob("spool/**/*.upload"))


async def test_who_is_ready_and_declines_is_replaced(home: Home) -> None:
    secure = await secure_round(home, "alice", "bob", "carol")
    for name in ("alice", "bob"):
        await secure.devices[name].ready()
    secure.devices["bob"].declines()
    recruit = await next_asked(secure)
    there = ("alice", "carol", recruit)
    for name in ("carol", recruit):
        await secure.devices[name].ready()
    await asyncio.gather(*(secure.devices[name].sums_up() for name in there))
    closed = await secure.closed()
    assert states(closed) == dict.fromkeys(there, "accepted") | {"bob": "declined"}


async def next_asked(secure: Secure) -> str:
    """Which of the spare clients is asked."""
    while True:
        for name in ("dave", "eve"):
            if asked(secure, name):
                return name
        secure.here.said.clear()
        await secure.here.said.wait()


async def test_once_the_sum_has_begun_nobody_else_is_asked_and_the_coordinator_has_time_for_the_rest(home: Home) -> None:
    secure = await secure_round(home, "alice", "bob", "carol", "dave")
    for name in ("alice", "bob", "carol"):
        await secure.devices[name].ready()
    assert (await secure.here.hears("dave", Cancel)).reason == "the sum of round 0 began without it: the goal was reached"
    await secure.here.hears("alice", SumRoster)
    assert asked(secure, "eve") == []
    secure.collection.stop("enough")
    assert (await secure.closed()).reason == "enough"


async def test_who_declines_as_the_sum_begins_is_not_waited_for(home: Home) -> None:
    secure = await secure_round(home, "alice", "bob", "carol", "dave", goal=4)
    for name in ("alice", "bob", "carol", "dave"):
        await secure.devices[name].ready()
    secure.devices["dave"].declines()  # before anything of that is looked at
    await asyncio.gather(*(secure.devices[name].sums_up() for name in ("alice", "bob", "carol")))
    assert states(await secure.closed()) == {"alice": "accepted", "bob": "accepted", "carol": "accepted", "dave": "declined"}


async def test_a_result_before_the_sum_is_refused(home: Home) -> None:
    secure = await secure_round(home, "alice", "bob", "carol", "dave", quorum=3)
    await secure.devices["alice"].ready()
    with pytest.raises(UpdateRefused, match="alice takes no part in a secure sum now"):
        await secure.devices["alice"].sends(Mask((), ()))
    for name in ("bob", "carol", "dave"):
        await secure.devices[name].ready()
    await secure.here.hears("bob", SumRoster)
    assert secure.collection.round.parts[secure.here.id_of("alice")].state is PartState.REFUSED
    secure.collection.stop("enough")
    await secure.closed()


async def test_who_shows_anothers_keys_is_refused(home: Home) -> None:
    secure = await secure_round(home, "alice", "bob", "carol", "dave")
    await secure.devices["alice"].ready()
    await secure.here.hears("bob", Assignment)
    secure.collection.said("bob", SumAdvert(secure.here.id_of("bob"), secure.devices["alice"].other_keys()))
    assert (await secure.here.hears("bob", Cancel)).reason == "bob shows keys that are said to be those of alice"
    secure.collection.stop("enough")
    assert states(await secure.closed())["bob"] == "refused"


async def test_who_leaves_the_sum_after_its_result_is_told_to_the_operator(home: Home) -> None:
    secure = await secure_round(home, "alice", "bob", "carol", "dave", goal=4, deadline_s=LONG_S)
    there = ("alice", "bob", "carol", "dave")

    async def rest(name: str) -> None:
        device = secure.devices[name]
        await device.ready()
        assert await device.sends(await device.shares()) is Verdict.ACCEPTED
        if name == "dave":
            device.declines("too hot")
        else:
            await device.reveals()

    await asyncio.gather(*map(rest, there))
    closed = await secure.closed()
    assert states(closed) == dict.fromkeys(there, "accepted")
    aggregate = secure.collection.tally.aggregate
    assert isinstance(aggregate, MaskedSum)
    assert len(aggregate.contained) == 4
    await asyncio.gather(*secure.collection._telling)
    events = [(event.what, event.told, event.client) for event in await secure.here.home.store.events(100)]
    assert ("secure sum left", "too hot", "dave") in events
