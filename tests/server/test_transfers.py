from __future__ import annotations

import pytest
from choral_server.transfers import Transfers


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def transfers(clock: Clock) -> Transfers:
    return Transfers(clock)


def test_nothing_advances_before_anything_moves(transfers: Transfers) -> None:
    assert transfers.advancing(1e9) == frozenset()


def test_a_transfer_advances_until_nothing_has_moved_for_a_while(clock: Clock, transfers: Transfers) -> None:
    transfers.moved("alice")
    clock.now += 20
    transfers.moved("bob")
    clock.now += 10
    assert transfers.advancing(30) == {"alice", "bob"}
    assert transfers.advancing(29.9) == {"bob"}
    clock.now += 0.5
    assert transfers.advancing(30) == {"bob"}
    transfers.moved("alice")
    assert transfers.advancing(30) == {"alice", "bob"}
    clock.now += 30.5
    assert transfers.advancing(30) == frozenset()


def test_what_has_ended_does_not_advance(clock: Clock, transfers: Transfers) -> None:
    transfers.moved("alice")
    transfers.moved("bob")
    transfers.ended("alice")
    transfers.ended("carol")  # of which nothing ever moved
    assert transfers.advancing(30) == {"bob"}
    transfers.moved("alice")  # the next one of the same client
    assert transfers.advancing(30) == {"alice", "bob"}


def test_what_moved_this_moment_advances_however_short_the_time(transfers: Transfers) -> None:
    transfers.moved("alice")
    assert transfers.advancing(0) == {"alice"}


def test_it_runs_by_a_clock_of_its_own() -> None:
    transfers = Transfers()
    transfers.moved("alice")
    assert transfers.advancing(3600) == {"alice"}
