from __future__ import annotations

import asyncio
import random

import pytest
from choral_client.backoff import BASE_S, CAP_S, Patience, full_jitter


class Edge(random.Random):
    """Draws the end of each interval."""

    def uniform(self, a: float, b: float) -> float:
        assert a == 0.0
        return b


@pytest.mark.parametrize(
    ("attempt", "longest_s"), [(1, 1.0), (2, 2.0), (3, 4.0), (6, 32.0), (7, 60.0), (8, 60.0), (40, 60.0), (10**6, 60.0)]
)
def test_the_longest_pause_doubles_up_to_the_cap(attempt: int, longest_s: float) -> None:
    assert (BASE_S, CAP_S) == (0.5, 60.0)
    assert full_jitter(attempt, Edge()) == longest_s


@pytest.mark.parametrize("attempt", [1, 3, 9])
def test_pauses_fill_the_whole_interval_evenly(attempt: int) -> None:
    longest_s = full_jitter(attempt, Edge())
    rng = random.Random(0)
    drawn = [full_jitter(attempt, rng) for _ in range(4000)]
    assert all(0 <= pause_s <= longest_s for pause_s in drawn)
    quarters = [sum(int(4 * pause_s / longest_s) == quarter for pause_s in drawn) for quarter in range(4)]
    assert sum(quarters) == 4000
    assert all(880 < count < 1120 for count in quarters)  # 1000 ± 4 standard deviations


def test_the_same_generator_gives_the_same_pauses() -> None:
    one, other = random.Random(7), random.Random(7)
    assert [full_jitter(n, one) for n in range(1, 9)] == [full_jitter(n, other) for n in range(1, 9)]


async def test_all_pauses_end_when_the_link_is_back_and_the_next_does_not() -> None:
    patience = Patience(Edge())
    waiting = [asyncio.create_task(patience.pause(8)) for _ in range(3)]
    await asyncio.sleep(0)
    patience.link_is_back()
    later = asyncio.create_task(patience.pause(8))
    async with asyncio.timeout(30):
        await asyncio.gather(*waiting)
    assert not later.done()
    later.cancel()


async def test_a_pause_ends_by_itself() -> None:
    class AtOnce(random.Random):
        def uniform(self, a: float, b: float) -> float:
            return 0.0

    async with asyncio.timeout(30):
        await Patience(AtOnce()).pause(8)
