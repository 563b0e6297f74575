from __future__ import annotations

import asyncio
import math
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import sqlalchemy as sa
from choral.errors import DatabaseGone, LeaseLost
from choral.messages import VersionRef
from choral.metrics import Metric
from choral.plan import Kind
from choral_server import failpoints
from choral_server.database import Database
from choral_server.failpoints import Transition
from choral_server.lease import Lease
from choral_server.objective import Progress
from choral_server.records import ClientRecord, EventRecord, Record, RunRecord, RunState, VersionRecord
from choral_server.rounds import Part, PartState, Round, RoundState
from choral_server.store import Store
from choral_server.tables import ASSIGNMENTS
from choral_server.troubles import Troubles
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from server.databases import Postgres

NOON = datetime(2025, 6, 1, 12, 0, 0, 123456, tzinfo=UTC)
KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
RUN = RunRecord("run", "boston_housing", "1", 100, NOON)
ALICE = ClientRecord("alice", True, 202, "0.1.0", "10.0.0.7:40000", NOON)
MEASURED = (
    Metric("loss", 0.1 + 0.2, 2**40),
    Metric("mse", -0.0, 0),
    Metric("worst", math.inf, 1),
    Metric("least", -math.inf, 1),
    Metric("größe \0 \ud800", 5e-324, 1),
)


def _version(number: int, run: str = "run") -> VersionRecord:
    return VersionRecord(run, VersionRef(number, bytes(range(32)), 2**40), f"s3://bucket/run/{number}.safetensors", NOON)


def _round(number: int, *states: PartState, run: str = "run", state: RoundState = RoundState.OPEN) -> Round:
    names = ("alice", "bob", "carol", "dave")
    # not in the order of their names
    parts = [Part(f"{run}-{number}-{9 - i}", names[i], part) for i, part in enumerate(states or (PartState.ANNOUNCED,))]
    return Round(run, number, Kind.TRAINING, number, 1, 1, {part.assignment: part for part in parts}, NOON, state)


def _with(round: Round, place: int, **changes: object) -> Round:
    name, part = list(round.parts.items())[place]
    return replace(round, parts={**round.parts, name: replace(part, **changes)})  # type: ignore[arg-type]


def _event(number: int, run: str = "", client: str = "") -> EventRecord:
    return EventRecord(NOON + timedelta(seconds=number), "client declined", f"event {number}", run, number or None, client)


@asynccontextmanager
async def _opened(url: str, troubles: Troubles | None = None) -> AsyncIterator[Store]:
    """The store, as a coordinator that starts finds it."""
    database = await Database.open(url, troubles or Troubles())
    try:
        yield await Store.open(database, await Lease.take(database, "here", 3600.0), KEY, lambda: NOON)
    finally:
        await database.close()


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[Store]:
    async with _opened(database_url) as opened:
        yield opened


# What survives a restart


@pytest.mark.parametrize("state", RunState)
async def test_a_run_survives_a_restart(database_url: str, state: RunState) -> None:
    record = RunRecord(
        name="run-2",
        task="boston_housing",
        task_version="1.5",
        rounds_planned=2**40,
        started_at=NOON.astimezone(timezone(timedelta(hours=5, minutes=30))),
        state=state,
        reason="the deadline – passed",
        rounds_done=7,
        next_round=9,
        latest=8,
        has_statistics=True,
        paused=True,
        abandoned=3,
        progress=Progress(best=6, value=15.25, stale=2),
        next_round_at=NOON + timedelta(hours=1),
        opened_at=NOON + timedelta(microseconds=1),
    )
    async with _opened(database_url) as store:
        await store.commit(record)
        assert store.runs == {"run-2": record}
    async with _opened(database_url) as store:
        assert store.runs == {"run-2": replace(record, next_round_at=None)}
        assert store.runs["run-2"].started_at.tzinfo is not None


async def test_a_new_run_survives_a_restart(database_url: str) -> None:
    async with _opened(database_url) as store:
        await store.commit(RUN)
    async with _opened(database_url) as store:
        assert store.runs == {"run": RUN}
        endless = replace(RUN, progress=Progress(best=1, value=math.inf))
        await store.commit(endless)
    async with _opened(database_url) as store:
        assert store.runs == {"run": endless}


async def test_runs_keep_the_order_in_which_they_were_begun(database_url: str) -> None:
    names = ["run", "run-2", "another", "run-10"]
    async with _opened(database_url) as store:
        for name in names:
            await store.commit(replace(RUN, name=name))  # all at the same time
    async with _opened(database_url) as store:
        await store.commit(replace(RUN, rounds_done=1), replace(RUN, name="a last one"))
        assert list(store.runs) == [*names, "a last one"]
    async with _opened(database_url) as store:
        assert list(store.runs) == [*names, "a last one"]


async def test_clients_survive_a_restart_but_do_not_attend(database_url: str) -> None:
    zoe = replace(ALICE, name="zoe", accepted=7, reason="left", refused=3, quarantine="three refused", examples=2**40)
    async with _opened(database_url) as store:
        await store.commit(zoe, ALICE)
        assert store.clients == {"zoe": zoe, "alice": ALICE}
    async with _opened(database_url) as store:
        assert list(store.clients.items()) == [("alice", replace(ALICE, attending=False)), ("zoe", replace(zoe, attending=False))]


async def test_a_version_survives_a_restart(database_url: str) -> None:
    measured = replace(_version(1), test=MEASURED, clients=(Metric("loss", 2.0, 3),))
    async with _opened(database_url) as store:
        await store.commit(RUN, _version(1), _version(2))
        await store.commit(measured)
    async with _opened(database_url) as store:
        assert await store.version("run", 1) == measured
        assert await store.versions("run", 10) == [_version(2), measured]
        assert await store.version("run", 3) is None
        assert await store.version("run-2", 1) is None
        assert await store.versions("run-2", 10) == []


async def test_what_is_not_a_number_survives(database_url: str) -> None:
    async with _opened(database_url) as store:
        await store.commit(RUN, replace(_version(1), test=(Metric("loss", math.nan, 5),)))
    async with _opened(database_url) as store:
        found = await store.version("run", 1)
        assert found is not None
        (metric,) = found.test
        assert (metric.name, metric.examples) == ("loss", 5)
        assert math.isnan(metric.value)


async def test_a_round_survives_a_restart(database_url: str) -> None:
    accepted = {
        "state": PartState.ACCEPTED,
        "examples": 2**40,
        "held_out": MEASURED,
        "work": MEASURED[:1],
        "digest": bytes(range(32)),
    }
    done = _with(_round(3, PartState.DECLINED, PartState.ACCEPTED, PartState.REFUSED, PartState.CANCELLED), 1, **accepted)
    done = replace(
        _with(done, 0, reason="no – power"), state=RoundState.ABANDONED, reason="missed", duration_s=1.25, goal=5, quorum=4
    )
    async with _opened(database_url) as store:
        await store.commit(RUN, done)
    async with _opened(database_url) as store:
        found = await store.round("run", 3)
        assert found == done
        assert found is not None
        assert list(found.parts) == list(done.parts)


async def test_how_open_parts_go_is_known_now_but_does_not_survive(database_url: str) -> None:
    states = (PartState.DOWNLOADING, PartState.WORKING, PartState.UPLOADING, PartState.ABSENT)
    live = _with(_round(1, *states), 3, reason="the client left")
    async with _opened(database_url) as store:
        await store.commit(RUN, live)
        assert await store.round("run", 1) == live
        later = _with(live, 0, state=PartState.WORKING)
        store.tell(later)
        assert await store.rounds("run", 1) == [later]
        assert await store.unfinished("run") == later
        assert await store.part("run-1-9") == later.parts["run-1-9"]
    async with _opened(database_url) as store:
        announced = _round(1, *[PartState.ANNOUNCED] * 4)
        assert await store.unfinished("run") == announced
        assert await store.part("run-1-9") == announced.parts["run-1-9"]


async def test_events_survive_a_restart(database_url: str) -> None:
    events = [_event(0), _event(1, "run"), _event(2, "run", "alice"), _event(3, "run-2", "alice")]
    async with _opened(database_url) as store:
        await store.commit(*events[:2])
        await store.commit(*events[2:])
    async with _opened(database_url) as store:
        assert await store.events(10) == events[::-1]
        assert await store.events(2) == [events[3], events[2]]
        assert await store.events(10, run="run") == [events[2], events[1]]
        assert await store.events(10, client="alice") == [events[3], events[2]]
        assert await store.events(10, run="run", client="alice") == [events[2]]
        assert await store.events(10, run="run-3") == []


async def test_an_event_counts_once_and_keeps_its_place(store: Store) -> None:
    first, second = _event(1), _event(2)
    await store.commit(first, second)
    await store.commit(replace(first, told="told otherwise"))
    assert await store.events(10) == [second, first]


# Rounds


async def test_the_newest_rounds_of_a_run(store: Store) -> None:
    other = replace(RUN, name="run-2")
    rounds = [_round(n, PartState.ACCEPTED, PartState.DECLINED, state=RoundState.DONE) for n in range(4)]
    await store.commit(RUN, other, *rounds, _round(1, run="run-2"))
    assert await store.rounds("run", 10) == rounds[::-1]
    assert await store.rounds("run", 2) == [rounds[3], rounds[2]]
    assert await store.rounds("run-2", 2) == [_round(1, run="run-2")]
    assert await store.rounds("run-3", 2) == []
    assert await store.round("run", 7) is None
    assert await store.part("run-2-9") == rounds[2].parts["run-2-9"]
    assert await store.part("nobody's \0") is None


@pytest.mark.parametrize("state", RoundState)
async def test_a_round_is_unfinished_until_it_is_done_or_abandoned(database_url: str, state: RoundState) -> None:
    last = _round(2, PartState.ACCEPTED, state=state)
    async with _opened(database_url) as store:
        await store.commit(RUN, _round(1, state=RoundState.DONE), last)
        expected = last if state in (RoundState.OPEN, RoundState.CLOSED) else None
        assert await store.unfinished("run") == expected
    async with _opened(database_url) as store:
        assert await store.unfinished("run") == expected


async def test_of_a_round_only_what_has_changed_is_written(store: Store) -> None:
    opened = _round(1, PartState.ANNOUNCED, PartState.ANNOUNCED, PartState.ANNOUNCED)
    await store.commit(RUN, opened)
    # what stands here afterwards has not been written again
    await store._database.write(lambda c: c.execute(sa.update(ASSIGNMENTS).values(reason="untouched")))
    going_on = _with(_with(opened, 1, state=PartState.WORKING), 2, state=PartState.ACCEPTED)
    await store.commit(going_on)
    query = sa.select(ASSIGNMENTS.c.reason, ASSIGNMENTS.c.state).order_by(ASSIGNMENTS.c.place)
    written = await store._database.read(lambda c: c.execute(query))
    assert written.all() == [("untouched", "announced"), ("untouched", "announced"), ("", "accepted")]
    assert await store.round("run", 1) == going_on


async def test_a_round_that_gets_another_part(database_url: str) -> None:
    opened = _round(1, PartState.ANNOUNCED)
    more = replace(opened, parts={**opened.parts, "a": Part("a", "erin")})
    async with _opened(database_url) as store:
        await store.commit(RUN, opened)
        await store.commit(more)
    async with _opened(database_url) as store:
        found = await store.unfinished("run")
        assert found == more
        assert found is not None
        assert list(found.parts) == ["run-1-9", "a"]
        done = replace(_with(_with(more, 0, state=PartState.ACCEPTED), 1, state=PartState.CANCELLED), state=RoundState.DONE)
        await store.commit(done)  # the first thing that this process writes of it
        assert await store.round("run", 1) == done


async def test_a_round_that_is_over_is_held_no_longer(store: Store) -> None:
    opened = _round(1)
    await store.commit(RUN, opened)
    closed = replace(_with(opened, 0, state=PartState.ACCEPTED), state=RoundState.CLOSED)
    await store.commit(closed)
    assert await store.unfinished("run") == closed
    done = replace(closed, state=RoundState.DONE)
    await store.commit(done)
    assert (store._live, store._written) == ({}, {})
    assert await store.round("run", 1) == done


# Commits


async def test_a_commit_is_all_or_nothing(store: Store) -> None:
    await store.commit(RUN)
    watch = store.watch()
    await _next(watch)
    orphan = _version(1, run="nobody's")
    with pytest.raises(sa.exc.IntegrityError):
        await store.commit(replace(RUN, rounds_done=1), _round(1), ALICE, _event(1), orphan)
    assert store.runs == {"run": RUN}
    assert store.clients == {}
    assert await store.round("run", 1) is None
    assert await store.events(10) == []
    store.end_watches()
    assert await _rest(watch) == []
    await store.commit(_round(1))
    assert await store.round("run", 1) == _round(1)


async def test_records_may_come_in_any_order_and_twice(store: Store) -> None:
    after = _with(_round(1), 0, state=PartState.ACCEPTED)
    await store.commit(ALICE, _version(1), _round(1), after, replace(ALICE, accepted=1), RUN, replace(RUN, latest=1))
    assert store.runs == {"run": replace(RUN, latest=1)}
    assert store.clients == {"alice": replace(ALICE, accepted=1)}
    assert await store.rounds("run", 10) == [after]


async def test_commits_keep_their_order(database_url: str) -> None:
    async with _opened(database_url) as store:
        await asyncio.gather(*(store.commit(replace(RUN, rounds_done=done), _event(done)) for done in range(20)))
        assert store.runs["run"].rounds_done == 19
        assert [event.round for event in await store.events(20)] == [*range(19, 0, -1), None]
    async with _opened(database_url) as store:
        assert store.runs["run"].rounds_done == 19


async def test_the_failpoints_are_right_before_and_right_after_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "choral.db"
    seen: list[tuple[str, int, int]] = []

    async with _opened(f"sqlite:///{path}") as store:

        def reach(name: str) -> None:
            with sqlite3.connect(path) as other:
                written = other.execute("SELECT count(*) FROM runs").fetchone()[0]
            seen.append((name, written, len(store.runs)))

        monkeypatch.setattr(failpoints, "reach", reach)
        await store.commit(RUN, at=Transition.RUN_BEGUN)
        await store.commit(RUN)
    assert seen == [("run-begun:before", 0, 0), ("run-begun:after", 1, 0)]


async def test_who_has_lost_the_lease_writes_nothing(database_url: str) -> None:
    async with _opened(database_url) as slow, _opened(database_url) as new:
        await new.commit(RUN)
        with pytest.raises(LeaseLost):
            await slow.commit(replace(RUN, rounds_done=5), _event(1), at=Transition.RUN_OVER)
        slow.later(ALICE)
        with pytest.raises(LeaseLost):
            await slow.flush()
        assert slow.runs == {}
        assert await new.events(10) == []
    async with _opened(database_url) as store:
        assert (store.runs, store.clients) == ({"run": RUN}, {})


async def test_commits_wait_for_a_server_that_is_gone_and_count_once(postgres: Postgres) -> None:
    troubles = Troubles()
    url = postgres.new_database()
    async with _opened(url, troubles) as store:
        await store.commit(RUN)
        gone = asyncio.Event()
        troubles.on_change = gone.set
        await asyncio.to_thread(postgres.stop)
        try:
            commits = [asyncio.ensure_future(store.commit(_round(n), _event(n), replace(RUN, next_round=n))) for n in (1, 2, 3)]
            async with asyncio.timeout(60):
                await gone.wait()
            assert "is gone" in troubles.present["database"]
            with pytest.raises(DatabaseGone):
                await store.rounds("run", 10)
            assert not any(commit.done() for commit in commits)
            assert store.runs == {"run": RUN}  # nobody hears of it yet
        finally:
            await asyncio.to_thread(postgres.start)
        async with asyncio.timeout(60):
            await asyncio.gather(*commits)
        assert troubles.present == {}
        assert await store.rounds("run", 10) == [_round(3), _round(2), _round(1)]
        assert [event.round for event in await store.events(10)] == [3, 2, 1]
    async with _opened(url) as store:
        assert store.runs == {"run": replace(RUN, next_round=3)}


# Clients


async def test_what_can_wait_is_known_now_and_written_with_the_next_commit(database_url: str) -> None:
    async with _opened(database_url) as store:
        watch = store.watch()
        store.later(ALICE)
        assert store.clients == {"alice": ALICE}
        assert await _next(watch) == ALICE
        store.later(replace(ALICE, reason="left"))
        await store.commit(RUN)
    async with _opened(database_url) as store:
        assert store.clients == {"alice": replace(ALICE, reason="left", attending=False)}
        store.later(replace(ALICE, name="bob"), replace(ALICE, accepted=1))
        await store.flush()
        await store.flush()
    async with _opened(database_url) as store:
        assert [(client.name, client.accepted) for client in store.clients.values()] == [("alice", 1), ("bob", 0)]
        store.tell(replace(ALICE, name="carol"))
        await store.commit(RUN)
    async with _opened(database_url) as store:
        assert list(store.clients) == ["alice", "bob"]  # carol was only told


async def test_a_commit_supersedes_what_waited(database_url: str) -> None:
    async with _opened(database_url) as store:
        store.later(ALICE)
        await store.commit(replace(ALICE, accepted=5))
        await store.flush()
        assert store.clients["alice"].accepted == 5
    async with _opened(database_url) as store:
        assert store.clients["alice"].accepted == 5


async def test_a_client_that_leaves_while_its_result_is_committed(database_url: str) -> None:
    left = replace(ALICE, attending=False, reason="left")
    both = replace(left, accepted=1, quarantine="suspicious")
    async with _opened(database_url) as store:
        store.later(ALICE)
        await store.flush()
        committing = asyncio.ensure_future(store.commit(replace(ALICE, accepted=1, quarantine="suspicious")))
        await asyncio.wait([committing], timeout=0)
        store.later(left)
        watch = store.watch()
        assert await _next(watch) == left
        await committing
        assert await _next(watch) == both
        assert store.clients["alice"] == both
        await store.flush()
        assert store.clients["alice"] == both
    async with _opened(database_url) as store:
        assert store.clients["alice"] == both


# Watching


async def _next(watch: AsyncIterator[Record]) -> Record:
    async with asyncio.timeout(30):
        return await anext(watch)


async def _take(watch: AsyncIterator[Record], count: int) -> list[Record]:
    return [await _next(watch) for _ in range(count)]


async def _rest(watch: AsyncIterator[Record]) -> list[Record]:
    async with asyncio.timeout(30):
        return [record async for record in watch]


async def test_a_watch_begins_with_what_there_is_and_goes_on_with_each_change(store: Store) -> None:
    await store.commit(RUN, ALICE, _round(1), _version(1))
    watch = store.watch()
    assert await _take(watch, 2) == [RUN, ALICE]
    for record in (_round(2), _version(2), replace(ALICE, accepted=1), replace(RUN, rounds_done=1), _event(1)):
        await store.commit(record)
        assert await _next(watch) == record


async def test_a_change_wakes_who_waits_for_it(store: Store) -> None:
    await store.commit(RUN)
    watch = store.watch()
    await _next(watch)
    waiting = asyncio.ensure_future(_next(watch))
    await asyncio.wait([waiting], timeout=0)
    assert not waiting.done()
    store.tell(ALICE)
    assert await waiting == ALICE


async def test_a_slow_reader_gets_the_newest_state_of_each_thing_once(store: Store) -> None:
    await store.commit(RUN)
    watch = store.watch()
    assert await _next(watch) == RUN
    events = [_event(number) for number in range(4)]
    for number in range(1, 4):
        done = replace(_round(number), duration_s=float(number))
        await store.commit(replace(RUN, rounds_done=number), _round(number), done, replace(ALICE, accepted=number))
        await store.commit(_version(number), events[number])
    store.tell(replace(ALICE, name="bob"))
    assert await _take(watch, 12) == [
        replace(_round(1), duration_s=1.0),
        _version(1),
        events[1],
        replace(_round(2), duration_s=2.0),
        _version(2),
        events[2],
        replace(RUN, rounds_done=3),
        replace(_round(3), duration_s=3.0),
        replace(ALICE, accepted=3),
        _version(3),
        events[3],
        replace(ALICE, name="bob"),
    ]
    store.end_watches()
    assert await _rest(watch) == []


async def test_records_of_the_same_name_but_another_kind_or_run_do_not_hide_each_other(store: Store) -> None:
    await store.commit(RUN)
    watch = store.watch()
    assert await _next(watch) == RUN
    different: list[Record] = [
        replace(RUN, rounds_done=1),
        replace(ALICE, name="run"),
        _round(1),
        _version(1),
        _round(1, run="run-2"),
    ]
    store.tell(*different)
    assert await _take(watch, 5) == different


async def test_readers_do_not_take_from_each_other(store: Store) -> None:
    await store.commit(RUN)
    first, second = store.watch(), store.watch()
    assert await _next(first) == await _next(second) == RUN
    await store.commit(ALICE)
    assert await _next(first) == ALICE
    await store.commit(replace(ALICE, accepted=1))
    assert await _next(first) == await _next(second) == replace(ALICE, accepted=1)


async def test_a_reader_far_behind_loses_the_oldest(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("choral_server.store._UNREAD", 3)
    watch = store.watch()
    waiting = asyncio.ensure_future(_next(watch))
    await asyncio.wait([waiting], timeout=0)
    store.tell(RUN)
    assert await waiting == RUN
    store.tell(_round(0), _round(1), _event(2), _round(3), _event(4))
    kept = await _take(watch, 3)
    assert [record.round if isinstance(record, EventRecord) else record for record in kept] == [2, _round(3), 4]


async def test_the_end_comes_after_what_has_not_been_read(store: Store) -> None:
    await store.commit(RUN)
    idle, reading = store.watch(), store.watch()
    assert await _next(idle) == await _next(reading) == RUN
    waiting = asyncio.ensure_future(_rest(idle))
    await asyncio.wait([waiting], timeout=0)
    last = replace(RUN, state=RunState.FINISHED)
    await store.commit(last)
    store.end_watches()
    assert await waiting == [last]
    assert await _rest(reading) == [last]  # who was not yet back for more when the end came


async def test_an_end_without_news_ends_who_waits(store: Store) -> None:
    await store.commit(RUN)
    watch = store.watch()
    assert await _next(watch) == RUN
    waiting = asyncio.ensure_future(_rest(watch))
    await asyncio.wait([waiting], timeout=0)
    store.end_watches()
    assert await waiting == []


async def test_a_reader_who_stops_is_forgotten(store: Store) -> None:
    await store.commit(RUN)
    watch = store.watch()
    await _next(watch)
    assert len(store._watchers) == 1
    await watch.aclose()  # type: ignore[attr-defined]
    assert len(store._watchers) == 0
    await store.commit(ALICE)
