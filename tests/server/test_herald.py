from __future__ import annotations

import asyncio
from dataclasses import replace

from choral.manifest import Manifest
from choral.messages import Hello, NewVersion, VersionRef
from choral_server.herald import Herald
from choral_server.sessions import Session, Sessions

HELLO = Hello(1, "", "start", "task", "1", Manifest(()), 10, "")
FIRST, SECOND = (VersionRef(number, bytes(32), 10) for number in (1, 2))


def attending(count: int) -> tuple[Sessions, list[Session]]:
    sessions = Sessions("task", "1", Manifest(()))
    return sessions, [sessions.admit(replace(HELLO, client=f"client-{number}"), "here") for number in range(count)]


async def test_few_hear_at_once_and_many_soon() -> None:
    sessions, all_of_them = attending(120)
    told = asyncio.Event()
    all_of_them[-1].wake = told.set
    Herald(sessions).proclaim(FIRST)
    assert [session.outbox for session in all_of_them[:50]] == [[NewVersion(FIRST)]] * 50
    assert not any(session.outbox for session in all_of_them[50:])
    async with asyncio.timeout(30):
        await told.wait()
    assert [session.outbox for session in all_of_them] == [[NewVersion(FIRST)]] * 120


async def test_a_version_that_is_overtaken_is_not_told_of() -> None:
    sessions, all_of_them = attending(120)
    herald = Herald(sessions)
    herald.proclaim(FIRST)
    herald.proclaim(SECOND)
    herald.finish()
    assert [session.outbox for session in all_of_them[:50]] == [[NewVersion(FIRST), NewVersion(SECOND)]] * 50
    assert [session.outbox for session in all_of_them[50:]] == [[NewVersion(SECOND)]] * 70


async def test_at_the_end_all_are_told_before_they_are_sent_away() -> None:
    sessions, all_of_them = attending(120)
    herald = Herald(sessions)
    herald.finish()
    assert not any(session.outbox for session in all_of_them)
    herald.proclaim(FIRST)
    sessions.leave(all_of_them[60])
    herald.finish()
    assert sum(session.outbox == [NewVersion(FIRST)] for session in all_of_them) == 119
