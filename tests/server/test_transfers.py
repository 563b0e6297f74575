"""Which transfers advance, and how many are admitted, by a clock that the test moves."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest
from choral_server.transfers import Transfers

MIB = 1 << 20


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def transfers(clock: Clock) -> Transfers:
    return Transfers(16 * MIB, clock)  # 4 MiB each at the most


async def passes(times: int = 3) -> None:
    """Whatever can go on has gone on."""
    for _ in range(times):
        await asyncio.sleep(0)


def test_nothing_advances_before_anything_moves(transfers: Transfers) -> None:
    transfers.begin("alice", MIB)
    assert transfers.advancing(1e9) == frozenset()


def test_a_transfer_advances_until_nothing_has_moved_for_a_while(clock: Clock, transfers: Transfers) -> None:
    alice, bob = transfers.begin("alice", MIB), transfers.begin("bob", MIB)
    alice.moved(1)
    clock.now = 10
    bob.moved(1)
    clock.now = 30
    assert transfers.advancing(30) == {"alice", "bob"}
    assert transfers.advancing(29.9) == {"bob"}
    clock.now = 40
    assert transfers.advancing(30) == {"bob"}
    alice.moved(1)
    assert transfers.advancing(30) == {"alice", "bob"}
    clock.now = 70.1
    assert transfers.advancing(30) == frozenset()


def test_what_has_ended_does_not_advance(transfers: Transfers) -> None:
    alice, bob, again = transfers.begin("alice", MIB), transfers.begin("bob", MIB), transfers.begin("alice", MIB)
    for each in (alice, bob, again):
        each.moved(1)
    transfers.end(alice)
    assert transfers.advancing(30) == {"alice", "bob"}
    transfers.end(again)
    assert transfers.advancing(0) == {"bob"}


async def test_large_transfers_wait_for_room_in_the_order_in_which_they_came(transfers: Transfers) -> None:
    order: list[str] = []
    for number in range(2):
        transfers.begin(f"earlier-{number}", 100 * MIB)

    async def move(name: str, begun: asyncio.Event, end: asyncio.Event) -> None:
        async with transfers.turn(name, 100 * MIB):
            order.append(name)
            begun.set()
            await end.wait()

    begun, end = [asyncio.Event() for _ in range(4)], [asyncio.Event() for _ in range(4)]
    moving = [asyncio.create_task(move(name, begun[n], end[n])) for n, name in enumerate("abcd")]
    await begun[1].wait()
    await passes()
    assert order == ["a", "b"]  # 4 MiB each
    assert transfers.advancing(1) == {"c", "d"}  # which wait for us, not we for them
    end[1].set()
    await begun[2].wait()
    assert order == ["a", "b", "c"]
    moving[3].cancel()
    for one in (0, 2):
        end[one].set()
    await asyncio.gather(*moving[:3])
    assert order == ["a", "b", "c"]
    assert transfers.advancing(1e9) == frozenset()


async def test_small_transfers_count_with_their_size(transfers: Transfers) -> None:
    async with AsyncExitStack() as stack:
        for number in range(16):
            async with asyncio.timeout(60):
                await stack.enter_async_context(transfers.turn(f"client-{number}", MIB))
        another = asyncio.create_task(stack.enter_async_context(transfers.turn("another", 1)))
        await passes()
        assert not another.done()
        another.cancel()


async def test_slow_transfers_make_room_for_others(clock: Clock, transfers: Transfers) -> None:
    slow = [transfers.begin(f"slow-{number}", 100 * MIB) for number in range(4)]
    another = asyncio.create_task(transfers.turn("another", 100 * MIB).__aenter__())
    await passes()
    assert not another.done()
    for _ in range(3):  # 100 kB each in a second
        clock.now += 1
        for one in slow:
            one.moved(100_000)
    transfers.end(transfers.begin("somebody", 1))  # any end makes those who wait look again
    async with asyncio.timeout(60):
        await another


async def test_one_larger_than_the_budget_is_admitted_alone(clock: Clock) -> None:
    transfers = Transfers(1, clock)
    async with asyncio.timeout(60), transfers.turn("alice", 100 * MIB):
        second = asyncio.create_task(transfers.turn("bob", 1).__aenter__())
        await passes()
        assert not second.done()
    async with asyncio.timeout(60):
        await second


async def test_several_are_under_way_however_small_the_budget(clock: Clock) -> None:
    transfers = Transfers(MIB, clock)
    async with AsyncExitStack() as stack:
        for number in range(4):
            async with asyncio.timeout(60):
                await stack.enter_async_context(transfers.turn(f"client-{number}", 100 * MIB))


async def test_while_nobody_looks_all_that_moved_is_remembered(clock: Clock, transfers: Transfers) -> None:
    """If the event loop stood still for a second, nothing has moved, and nobody is slow for that."""
    fast = [transfers.begin(f"fast-{number}", 100 * MIB) for number in range(4)]
    for one in fast:
        one.moved(4 * MIB)
    clock.now = 1
    waits = asyncio.create_task(transfers.turn("another", 100 * MIB).__aenter__())
    await passes()
    assert not waits.done()
    waits.cancel()
