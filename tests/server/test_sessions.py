from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from choral.errors import InvalidMessage, ManifestMismatch, NameTaken, TaskMismatch
from choral.manifest import Entry, EntryKind, Manifest
from choral.messages import Cancel, FromCoordinator, Hello
from choral.wire import PROTOCOL_VERSION
from choral_server.sessions import Session, Sessions

MANIFEST = Manifest((Entry("weight", "F32", (1, 13), 0, EntryKind.AVERAGED), Entry("bias", "F32", (1,), 13, EntryKind.AVERAGED)))
HELLO = Hello(PROTOCOL_VERSION, "alice", "start-1", "boston_housing", "1", MANIFEST, 202, "0.1.0")
WORD, LAST = Cancel("run/1/alice", "so"), Cancel("run/2/alice", "and so")


@pytest.fixture
def sessions() -> Sessions:
    return Sessions("boston_housing", "1", MANIFEST)


async def _heard(session: Session) -> list[FromCoordinator]:
    """What a stream carries that is closed."""
    assert session.closed
    return session.outbox


async def test_who_is_admitted_attends_until_it_leaves(sessions: Sessions) -> None:
    session = sessions.admit(HELLO, "10.0.0.7:40000")
    assert (session.client, session.instance, session.software, session.address) == (
        *("alice", "start-1", "0.1.0"),
        "10.0.0.7:40000",
    )
    sessions.admit(replace(HELLO, client="bob"), "10.0.0.8:40000")
    assert sorted(sessions.present()) == ["alice", "bob"]
    assert len(sessions) == 2
    assert sessions.leave(session)
    assert sessions.present() == ("bob",)


@pytest.mark.parametrize(
    ("change", "kind", "told"),
    [
        (
            {"task": "digits"},
            TaskMismatch,
            "this coordinator trains task boston_housing; client alice has digits: give it --task",
        ),
        (
            {"task_version": "2"},
            TaskMismatch,
            "this coordinator trains version 1 of task boston_housing; client alice has version 2: "
            "install the same version of the task's code",
        ),
        (
            {"manifest": Manifest((replace(MANIFEST.entries[0], shape=(1, 12)), MANIFEST.entries[1]))},
            ManifestMismatch,
            "the model of client alice is not the coordinator's: entry 0 is weight F32 [1, 12] (averaged) "
            "where weight F32 [1, 13] (averaged) is expected: install the same version of the task's code",
        ),
        (
            {"manifest": Manifest(MANIFEST.entries[:1])},
            ManifestMismatch,
            "the model of client alice is not the coordinator's: entry 1 is missing where bias F32 [1] (averaged) is expected: "
            "install the same version of the task's code",
        ),
    ],
)
async def test_who_cannot_take_part_is_refused_with_the_reason(
    sessions: Sessions, change: dict[str, object], kind: type[Exception], told: str
) -> None:
    with pytest.raises(kind) as refused:
        sessions.admit(replace(HELLO, **change), "10.0.0.7:40000")  # type: ignore[arg-type]
    assert type(refused.value) is kind
    assert str(refused.value) == told
    assert len(sessions) == 0


@pytest.mark.parametrize("name", ["", "a" * 65, "al ice", "alice/bob", "älice", "alice\n"])
async def test_a_name_that_is_none_is_refused(sessions: Sessions, name: str) -> None:
    with pytest.raises(InvalidMessage, match="use 1 to 64 letters, digits, dots, dashes and underscores"):
        sessions.admit(replace(HELLO, client=name), "10.0.0.7:40000")


async def test_a_name_belongs_to_one_client(sessions: Sessions) -> None:
    first = sessions.admit(HELLO, "10.0.0.7:40000")
    with pytest.raises(
        NameTaken, match=r"^a client named alice attends already, from 10\.0\.0\.7:40000: give this one another name$"
    ):
        sessions.admit(replace(HELLO, instance="start-2"), "10.0.0.9:40000")
    sessions.say("alice", WORD)
    sessions.leave(first)
    assert await _heard(first) == [WORD]
    assert sessions.admit(replace(HELLO, instance="start-2"), "10.0.0.9:40000").address == "10.0.0.9:40000"


async def test_a_client_takes_over_from_its_own_broken_stream(sessions: Sessions) -> None:
    broken = sessions.admit(HELLO, "10.0.0.7:40000")
    session = sessions.admit(HELLO, "10.0.0.7:40001")
    assert sessions.present() == ("alice",)
    assert await _heard(broken) == []  # closed
    assert not sessions.leave(broken)  # the end of the old stream does not end the new one
    sessions.say("alice", WORD)
    assert sessions.leave(session)
    assert await _heard(session) == [WORD]
    assert not sessions.leave(session)


async def test_what_is_said_arrives_in_order_before_the_stream_closes(sessions: Sessions) -> None:
    alice, bob = sessions.admit(HELLO, "a"), sessions.admit(replace(HELLO, client="bob"), "b")
    sessions.say("alice", WORD)
    sessions.say("nobody", WORD)
    for name in sessions.present():
        sessions.say(name, LAST)
    for session in (alice, bob):
        session.close()
        session.say(WORD)
    assert await _heard(alice) == [WORD, LAST]
    assert await _heard(bob) == [LAST]


async def test_waiting_until_everyone_has_gone(sessions: Sessions) -> None:
    async with asyncio.timeout(30):
        await sessions.emptied()
        alice, bob = sessions.admit(HELLO, "a"), sessions.admit(replace(HELLO, client="bob"), "b")
        waiting = asyncio.ensure_future(sessions.emptied())
        sessions.leave(alice)
        await asyncio.wait([waiting], timeout=0)
        assert not waiting.done()
        sessions.leave(bob)
        await waiting


async def test_waiting_until_everyone_has_attended_since_the_start(sessions: Sessions) -> None:
    async with asyncio.timeout(30):
        await sessions.seen([])
        waiting = [asyncio.ensure_future(sessions.seen(names)) for names in (["alice"], {"alice", "bob"}, ["bob", "carol"])]

        async def done() -> list[bool]:
            await asyncio.wait(waiting, timeout=0)
            return [task.done() for task in waiting]

        assert await done() == [False, False, False]
        alice = sessions.admit(HELLO, "a")
        await waiting[0]
        assert await done() == [True, False, False]
        sessions.leave(alice)  # it has been there
        sessions.admit(replace(HELLO, client="bob"), "b")
        await waiting[1]
        assert await done() == [True, True, False]
        sessions.admit(replace(HELLO, client="carol"), "c")
        await waiting[2]
        await sessions.seen(["alice", "bob", "carol"])


async def test_who_is_refused_has_not_attended(sessions: Sessions) -> None:
    with pytest.raises(TaskMismatch):
        sessions.admit(replace(HELLO, task="digits"), "a")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await sessions.seen(["alice"])
