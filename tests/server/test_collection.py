"""A round under way, over a real database and a real spool: who is asked, what counts, and what time does to it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from choral.errors import Unreachable, UpdateRefused
from choral.messages import Assignment, Cancel, FromCoordinator, Hello, Phase, Receipt, Status, UploadHeader, Verdict
from choral.plan import Kind
from choral.wire import PROTOCOL_VERSION
from choral_server.aggregate import WeightedSum
from choral_server.attendance import Attendance
from choral_server.collection import Collection, House, assignment_id
from choral_server.rounds import Part, PartState, Round, RoundState, Upload
from choral_server.run import Run
from choral_server.sessions import Session, Sessions
from choral_server.spool import RoundSpool
from choral_server.transfers import Transfers
from choral_server.troubles import Troubles
from server.home import NOON, PLAIN, Home, config, home

__all__ = ["home"]

T = TypeVar("T", bound=FromCoordinator)
LONG_S, SHORT_S = 600.0, 0.2
CHANGE = np.array([1.0, 2.0, 3.0], "<f4")


class Floor:
    """A coordinator's round, its clients, and a clock for their transfers. `spool_bytes` as in the configuration."""

    def __init__(self, home: Home, run: Run, spool_bytes: int) -> None:
        self.home = home
        self.run = run
        self.time_s = 0.0
        self.transfers = Transfers(2**20, lambda: self.time_s)
        self.said = asyncio.Event()
        self.sessions = Sessions(PLAIN.name, PLAIN.version, run.model.manifest)
        self.house = House(home.store, self.sessions, self.transfers, home.troubles, spool_bytes, lambda: NOON)
        self.attendance = Attendance(self.house, 15.0, lambda: None)
        self.open: dict[str, Session] = {}

    def join(self, *clients: str) -> None:
        """They attend, and have read their welcome."""
        for client in clients:
            hello = Hello(
                PROTOCOL_VERSION, client, f"start of {client}", PLAIN.name, PLAIN.version, self.run.model.manifest, 10, ""
            )
            self.open[client] = self.sessions.admit(hello, "here")
            self.open[client].wake = self.said.set
            self.attendance.joined(self.open[client], self.run)

    def leave(self, client: str) -> None:
        """Its stream ends."""
        self.sessions.leave(self.open[client])
        self.attendance.left(self.open[client], "it left")

    async def hears(self, client: str, kind: type[T]) -> T:
        """The next message of this kind that the client gets."""
        outbox = self.open[client].outbox
        while True:
            while outbox:
                if isinstance(message := outbox.pop(0), kind):
                    return message
            self.said.clear()
            await self.said.wait()

    def id_of(self, client: str) -> str:
        """The name of its part in the first round."""
        return assignment_id(self.run.record, 0, client)

    async def asked(self, *clients: str, quorum: int = 1) -> Collection:
        """A training round of these clients, committed and not yet announced; all of their results are wanted."""
        parts = {self.id_of(client): client for client in clients}
        opened = Round(
            self.run.record.name,
            0,
            Kind.TRAINING,
            0,
            len(parts),
            quorum,
            {name: Part(name, client) for name, client in parts.items()},
            NOON,
        )
        await self.home.store.commit(opened)
        return self.taken_up(opened)

    def taken_up(self, round: Round) -> Collection:
        """The collection of a round that was stored."""
        spool = RoundSpool(self.home.folder / "spool" / round.run / str(round.number), self.home.troubles)
        return Collection(self.run, round, spool, self.house)

    async def again(self, collection: Collection, *clients: str) -> None:
        """These attend and send what is asked of them; all three results are then in the sum."""
        collecting = self.begin(collection)
        self.join(*clients)
        for client in clients:
            await sends(collection, client)
        assert states(await collecting) == {"alice": "accepted", "bob": "accepted", "carol": "accepted"}
        assert isinstance(collection.tally.aggregate, WeightedSum)
        assert len(collection.tally.aggregate.contained) == 3

    def begin(self, collection: Collection) -> asyncio.Task[Round]:
        """Collect it, as `run_round` does."""
        self.attendance.collection = collection
        return asyncio.create_task(collection.collect())


async def upload(collection: Collection, client: str, change: np.ndarray[Any, Any] = CHANGE) -> Upload:
    """A result of the client, whole in the spool."""
    content = change.tobytes()
    digest = hashlib.sha256(content).digest()
    header = header_of(collection, client, len(content), digest)

    async def pieces() -> AsyncIterator[bytes]:
        yield content

    path = await collection.spool.store(header, pieces())
    return Upload(header.assignment, client, 10, (), (), digest, path)


def header_of(
    collection: Collection, client: str, payload_bytes: int = 12, digest: bytes = b"", examples: int = 10
) -> UploadHeader:
    assignment = assignment_id(collection.run.record, collection.round.number, client)
    return UploadHeader(assignment, client, examples, Kind.TRAINING, payload_bytes, (), (), digest)


async def sends(collection: Collection, *clients: str) -> list[Verdict]:
    """Each sends its result; what became of them."""
    return [(await collection.submit(await upload(collection, client))).verdict for client in clients]


async def floor(home: Home, spool_bytes: int = 1 << 20, **settings: Any) -> Floor:
    run = {"cohort_size": 5, "deadline_s": LONG_S} | settings
    return Floor(home, await home.open(config(run)), spool_bytes)


def states(round: Round) -> dict[str, str]:
    return {part.client: part.state.value for part in round.parts.values()}


# Who is asked


async def test_all_who_are_asked_hear_of_their_part_and_count(home: Home) -> None:
    here = await floor(home)
    here.join("alice", "bob")
    collection = await here.asked("alice", "bob")
    collecting = here.begin(collection)
    for client in ("alice", "bob"):
        asked = await here.hears(client, Assignment)
        assert (asked.id, asked.plan.cohort) == (here.id_of(client), 2)
    assert await sends(collection, "alice", "bob") == [Verdict.ACCEPTED] * 2
    assert states(await collecting) == {"alice": "accepted", "bob": "accepted"}
    assert isinstance(collection.tally.aggregate, WeightedSum)
    assert collection.tally.aggregate.mean().tolist() == CHANGE.tolist()


async def test_how_many_examples_a_client_has_is_known_by_its_result_and_not_forgotten(home: Home) -> None:
    here = await floor(home)
    here.join("alice", "bob")
    assert {client.examples for client in home.store.clients.values()} == {0}
    collecting = here.begin(collection := await here.asked("alice", "bob"))
    await sends(collection, "alice")
    collection.stop("enough")
    await collecting
    here.leave("alice")
    here.join("alice")
    assert {name: client.examples for name, client in home.store.clients.items()} == {"alice": 10, "bob": 0}


async def test_who_attends_before_a_round_is_taken_up_is_asked(home: Home) -> None:
    here = await floor(home)
    await here.asked("alice", "bob")
    here.join("alice")  # the server listens, and the round is not yet looked up
    stored = await home.store.unfinished("run")
    assert stored is not None
    collection = here.taken_up(stored)
    await collection.restore()
    collecting = here.begin(collection)
    assert (await here.hears("alice", Assignment)).id == here.id_of("alice")
    here.join("bob")
    assert (await here.hears("bob", Assignment)).id == here.id_of("bob")
    await sends(collection, "alice", "bob")
    await collecting


async def test_who_left_while_the_round_was_stored_is_replaced(home: Home) -> None:
    here = await floor(home, absence_s=SHORT_S)
    here.join("alice", "bob", "carol")
    collection = await here.asked("alice", "bob")
    here.leave("bob")  # nobody minds the new round yet
    collecting = here.begin(collection)
    assert (await here.hears("carol", Assignment)).id == here.id_of("carol")
    await sends(collection, "alice", "carol")
    assert states(await collecting) == {"alice": "accepted", "bob": "cancelled", "carol": "accepted"}


async def test_who_vanishes_is_replaced_after_a_while(home: Home) -> None:
    here = await floor(home, absence_s=SHORT_S)
    here.join("alice", "bob", "carol")
    collecting = here.begin(collection := await here.asked("alice", "bob"))
    await here.hears("bob", Assignment)
    here.leave("bob")
    await here.hears("carol", Assignment)
    await sends(collection, "alice", "carol")
    assert states(await collecting) == {"alice": "accepted", "bob": "cancelled", "carol": "accepted"}


async def test_who_comes_back_in_time_is_not_replaced(home: Home) -> None:
    here = await floor(home, absence_s=LONG_S)
    here.join("alice", "bob", "carol")
    collecting = here.begin(collection := await here.asked("alice", "bob"))
    await here.hears("bob", Assignment)
    here.leave("bob")
    here.join("bob")
    assert (await here.hears("bob", Assignment)).id == here.id_of("bob")
    await sends(collection, "alice", "bob")
    assert set(states(await collecting)) == {"alice", "bob"}


async def test_who_declines_is_replaced_at_once(home: Home) -> None:
    here = await floor(home, absence_s=LONG_S)
    here.join("alice", "bob", "carol")
    collecting = here.begin(collection := await here.asked("alice", "bob"))
    collection.reported("bob", Status(here.id_of("bob"), Phase.DECLINED, "no time"))
    await here.hears("carol", Assignment)
    await sends(collection, "alice", "carol")
    assert states(await collecting) == {"alice": "accepted", "bob": "declined", "carol": "accepted"}


@pytest.mark.parametrize("how", ["declines", "is refused"])
async def test_a_replacement_saves_a_round_that_its_quorum_would_end(home: Home, how: str) -> None:
    here = await floor(home)
    here.join("alice", "bob", "carol")
    collecting = here.begin(collection := await here.asked("alice", "bob", quorum=2))
    if how == "declines":
        collection.reported("bob", Status(here.id_of("bob"), Phase.DECLINED, "no time"))
    else:
        collection.reject(header_of(collection, "bob"), "it holds NaN")
    await here.hears("carol", Assignment)
    await sends(collection, "alice", "carol")
    assert (await collecting).state is RoundState.CLOSED


async def test_who_is_away_for_a_moment_is_waited_for_though_there_is_a_quorum(home: Home) -> None:
    here = await floor(home, absence_s=LONG_S)
    here.join("alice", "bob")
    collecting = here.begin(collection := await here.asked("alice", "bob"))
    await here.hears("bob", Assignment)
    here.leave("bob")
    await sends(collection, "alice")
    here.join("bob")
    await here.hears("bob", Assignment)
    await sends(collection, "bob")
    assert states(await collecting) == {"alice": "accepted", "bob": "accepted"}


async def test_who_is_away_for_long_is_not_waited_for_if_there_is_a_quorum(home: Home) -> None:
    here = await floor(home, absence_s=SHORT_S)
    here.join("alice", "bob")
    collecting = here.begin(collection := await here.asked("alice", "bob"))
    here.leave("bob")
    await sends(collection, "alice")
    assert states(await collecting) == {"alice": "accepted", "bob": "cancelled"}


async def test_who_is_away_while_its_result_arrives_is_waited_for(home: Home) -> None:
    here = await floor(home, absence_s=SHORT_S)
    here.join("alice", "bob")
    collecting = here.begin(collection := await here.asked("alice", "bob"))
    here.transfers.begin("bob", 1).moved(1)
    here.leave("bob")
    await sends(collection, "alice")
    await asyncio.wait({collecting}, timeout=10 * SHORT_S)
    assert not collecting.done()
    here.time_s += LONG_S  # and nothing of it has moved
    assert states(await collecting) == {"alice": "accepted", "bob": "cancelled"}


async def test_the_bound_is_that_of_the_round_though_the_configuration_asks_for_less_now(home: Home) -> None:
    here = await floor(home, cohort_size=1)
    collection = await here.asked("alice", "bob", "carol")
    assert collection.bounds().cohort_size == 3  # or their sum could overflow


async def test_who_is_quarantined_within_a_round_is_told_and_replaced(home: Home) -> None:
    here = await floor(home)
    here.join("alice", "bob", "carol")
    collecting = here.begin(collection := await here.asked("alice", "bob", quorum=2))
    await here.attendance.quarantine("bob", "stolen")
    assert (await here.hears("bob", Cancel)).reason == "it is quarantined: stolen"
    await here.hears("carol", Assignment)
    await sends(collection, "alice", "carol")
    assert states(await collecting) == {"alice": "accepted", "bob": "refused", "carol": "accepted"}


async def test_nobody_is_asked_in_the_second_half_of_the_time(home: Home) -> None:
    here = await floor(home, absence_s=SHORT_S, deadline_s=2 * SHORT_S)
    here.join("alice", "bob", "carol")
    collecting = here.begin(collection := await here.asked("alice", "bob"))
    await sends(collection, "alice")
    here.leave("bob")  # away too long only when half of the time has passed
    assert set(states(await collecting)) == {"alice", "bob"}


async def test_who_is_quarantined_replaces_nobody(home: Home) -> None:
    here = await floor(home, absence_s=SHORT_S)
    here.join("alice", "bob", "carol", "dave")
    await here.attendance.quarantine("carol", "strange")
    collecting = here.begin(collection := await here.asked("alice", "bob"))
    here.leave("bob")
    await here.hears("dave", Assignment)
    await sends(collection, "alice", "dave")
    assert set(states(await collecting)) == {"alice", "bob", "dave"}


# Time


async def test_at_the_deadline_a_round_closes_with_what_it_has(home: Home) -> None:
    here = await floor(home, deadline_s=SHORT_S)
    here.join("alice", "bob")
    collecting = here.begin(collection := await here.asked("alice", "bob"))
    await sends(collection, "alice")
    closed = await collecting
    assert (closed.state, states(closed)) == (RoundState.CLOSED, {"alice": "accepted", "bob": "cancelled"})
    assert "the deadline of 0.2 s passed" in (await here.hears("bob", Cancel)).reason


async def test_at_the_deadline_without_a_quorum_it_is_abandoned(home: Home) -> None:
    here = await floor(home, deadline_s=SHORT_S)
    here.join("alice", "bob")
    collecting = here.begin(await here.asked("alice", "bob", quorum=2))
    closed = await collecting
    assert closed.state is RoundState.ABANDONED
    assert "quorum of 2 missed with 0 accepted: alice" in closed.reason
    assert [event.what for event in await home.store.events(9)] == ["round abandoned"]


async def test_a_transfer_that_advances_is_not_cut_off(home: Home) -> None:
    here = await floor(home, deadline_s=SHORT_S, extension_s=LONG_S)
    here.join("alice", "bob", "carol")
    collecting = here.begin(collection := await here.asked("alice", "bob", "carol"))
    await sends(collection, "alice")
    here.transfers.begin("bob", 1).moved(1)
    assert "the deadline of 0.2 s passed" in (await here.hears("carol", Cancel)).reason
    assert not collecting.done()
    await sends(collection, "bob")
    assert states(await collecting) == {"alice": "accepted", "bob": "accepted", "carol": "cancelled"}


async def test_a_transfer_that_stands_still_is_cut_off(home: Home) -> None:
    here = await floor(home, deadline_s=SHORT_S, extension_s=LONG_S, stall_s=SHORT_S)
    here.join("alice", "bob", "carol")
    collecting = here.begin(collection := await here.asked("alice", "bob", "carol"))
    await sends(collection, "alice")
    here.transfers.begin("bob", 1).moved(1)
    await here.hears("carol", Cancel)
    here.time_s += 2 * SHORT_S  # and nothing of bob's has moved
    assert states(await collecting) == {"alice": "accepted", "bob": "cancelled", "carol": "cancelled"}


async def test_a_deadline_is_moved_only_so_far(home: Home) -> None:
    here = await floor(home, deadline_s=SHORT_S, extension_s=SHORT_S)
    here.join("alice", "bob")
    collecting = here.begin(collection := await here.asked("alice", "bob"))
    await sends(collection, "alice")
    here.transfers.begin("bob", 1).moved(1)  # always, by a clock that stands still
    assert states(await collecting) == {"alice": "accepted", "bob": "cancelled"}


async def test_no_deadline_passes_while_the_coordinator_is_in_trouble(home: Home) -> None:
    here = await floor(home, deadline_s=SHORT_S)
    here.join("alice", "bob")
    home.troubles.found("artifacts", "gone")
    collecting = here.begin(collection := await here.asked("alice", "bob"))
    await sends(collection, "alice")
    await asyncio.wait({collecting}, timeout=10 * SHORT_S)
    assert not collecting.done()
    home.troubles.over("artifacts")
    assert states(await collecting) == {"alice": "accepted", "bob": "cancelled"}


async def test_time_in_trouble_is_not_the_clients_time(home: Home) -> None:
    clock_s = 0.0
    home.troubles = Troubles(lambda: clock_s)
    here = await floor(home, deadline_s=SHORT_S)
    here.join("alice", "bob")
    collecting = here.begin(collection := await here.asked("alice", "bob"))
    home.troubles.found("artifacts", "gone")
    clock_s += LONG_S
    home.troubles.over("artifacts")
    await asyncio.wait({collecting}, timeout=1.5)  # longer than it takes to look again
    assert not collecting.done()
    assert await sends(collection, "alice", "bob") == [Verdict.ACCEPTED] * 2
    await collecting


async def test_a_disk_that_nobody_writes_to_is_looked_at(home: Home) -> None:
    here = await floor(home, deadline_s=1.0)
    here.join("alice", "bob")
    collecting = here.begin(collection := await here.asked("alice", "bob"))
    await sends(collection, "alice")
    home.troubles.found("disk", "full")  # it was; bob hangs, so that nobody finds out that it is not any more
    assert states(await collecting) == {"alice": "accepted", "bob": "cancelled"}
    assert home.troubles.present == {}


# What counts


async def test_what_comes_after_the_round_is_late_and_leaves_nothing(home: Home) -> None:
    here = await floor(home, deadline_s=SHORT_S)
    here.join("alice", "bob")
    collecting = here.begin(collection := await here.asked("alice", "bob"))
    await sends(collection, "alice")
    await collecting
    late = await upload(collection, "bob")
    receipt = await collection.submit(late)
    assert receipt.verdict is Verdict.LATE
    assert receipt.reason.startswith("this part was cancelled: round 0 closed: the deadline of 0.2 s passed")
    assert not late.path.exists()


async def test_who_is_refused_again_and_again_is_quarantined(home: Home) -> None:
    here = await floor(home, quarantine_after=2)
    here.join("alice", "bob")
    for _ in range(2):
        collecting = here.begin(collection := await here.asked("alice", "bob"))
        with pytest.raises(UpdateRefused, match="bob claims 0 examples"):
            collection.expects(header_of(collection, "bob", examples=0))
        await sends(collection, "alice")
        assert states(await collecting) == {"alice": "accepted", "bob": "refused"}
    assert here.house.eligible() == ("alice",)
    with pytest.raises(UpdateRefused, match="client bob is quarantined: 2 results in a row were refused, the last"):
        await here.attendance.expects(header_of(collection, "bob"))
    await here.attendance.release("bob")
    assert here.house.eligible() == ("alice", "bob")
    told = [(event.what, event.client) for event in await home.store.events(9)]
    assert told == [
        ("client released", "bob"),
        ("result refused", "bob"),  # while quarantined
        ("client quarantined", "bob"),
        ("result refused", "bob"),
        ("result refused", "bob"),
    ]


async def test_what_is_in_the_sum_does_not_fill_the_disk(home: Home) -> None:
    here = await floor(home, spool_bytes=0)
    here.join("alice", "bob", "carol")
    collecting = here.begin(collection := await here.asked("alice", "bob", "carol"))
    await sends(collection, "alice", "bob")
    collection.reported("carol", Status(here.id_of("carol"), Phase.DECLINED, "no"))
    await collecting
    assert {path.name for path in collection.spool.sum_path.parent.iterdir()} == {"sum"}


# After a restart


async def stopped_after(here: Floor, *accepted: str) -> Round:
    """A round of alice, bob and carol whose coordinator ended once these had been accepted, as it is stored."""
    here.join("alice", "bob", "carol")
    collecting = here.begin(collection := await here.asked("alice", "bob", "carol"))
    for client in accepted:
        await collection.submit(await upload(collection, client, CHANGE * len(client)))
    collecting.cancel()
    await asyncio.wait({collecting})
    stored = await here.home.store.unfinished("run")
    assert stored is not None
    return stored


@pytest.mark.parametrize("spool_bytes", [0, 12, 1 << 20])  # all in the sum, one in it and one not, none in it
async def test_what_was_accepted_counts_once_after_a_restart(home: Home, spool_bytes: int) -> None:
    here = await floor(home, spool_bytes=spool_bytes)
    collection = here.taken_up(await stopped_after(here, "alice", "bob"))
    await collection.restore()
    assert isinstance(collection.tally.aggregate, WeightedSum)
    assert collection.tally.aggregate.contained == {here.id_of("alice"), here.id_of("bob")}
    assert collection.tally.aggregate.mean().tolist() == (CHANGE * 4).tolist()  # 5 and 3 letters, of equal weight
    assert collection.round.part_of("carol") == Part(here.id_of("carol"), "carol", PartState.ABSENT, "the coordinator restarted")


@pytest.mark.parametrize("lose", [lambda path: path.unlink(), lambda path: damage(path)])
async def test_an_accepted_result_that_is_lost_is_asked_for_again(home: Home, lose: Callable[[Path], None]) -> None:
    """As by a power cut: the database has the acceptance, and the disk does not have the result."""
    here = await floor(home)
    collection = here.taken_up(await stopped_after(here, "alice", "bob"))
    part = collection.round.part_of("bob")
    assert part is not None
    lose(collection.spool.path("bob", part.digest))
    await collection.restore()
    assert states(collection.round) == {"alice": "accepted", "bob": "absent", "carol": "absent"}
    await here.again(collection, "bob", "carol")


async def test_what_a_damaged_sum_held_is_asked_for_again(home: Home) -> None:
    here = await floor(home, spool_bytes=0)
    collection = here.taken_up(await stopped_after(here, "alice"))
    damage(collection.spool.sum_path)
    await collection.restore()
    assert states(collection.round) == {"alice": "absent", "bob": "absent", "carol": "absent"}
    await here.again(collection, "alice", "bob", "carol")


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


async def test_a_result_that_is_offered_before_its_round_is_taken_up_is_not_lost(home: Home) -> None:
    here = await floor(home)
    stored = await stopped_after(here, "alice")
    offered = header_of(here.taken_up(stored), "bob")
    here.attendance.collection = None
    await home.store.commit(stored)  # nothing of it is in this process any more
    with pytest.raises(Unreachable, match="is being taken up: send the result in a moment"):
        await here.attendance.expects(offered)
    here.attendance.settled = True  # and it was not: the configuration names another run now
    with pytest.raises(UpdateRefused, match="is of a run that this coordinator is not on"):
        await here.attendance.expects(offered)


async def test_a_result_whose_round_is_taken_up_while_the_database_is_asked_is_expected(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = await floor(home)
    collection = here.taken_up(await stopped_after(here, "alice"))
    await collection.restore()
    here.attendance.collection = None
    asked = home.store.part

    async def meanwhile(assignment: str) -> Part | None:
        part = await asked(assignment)
        here.attendance.collection, here.attendance.settled = collection, True
        return part

    monkeypatch.setattr(home.store, "part", meanwhile)
    assert await here.attendance.expects(header_of(collection, "bob")) is collection


async def test_a_result_sent_again_after_a_restart_is_a_duplicate(home: Home) -> None:
    here = await floor(home)
    collection = here.taken_up(await stopped_after(here, "alice"))
    await collection.restore()
    here.attendance.collection = collection
    answer = await here.attendance.expects(header_of(collection, "alice"))
    assert answer == Receipt(Verdict.DUPLICATE, "this result was accepted before and counts once")
