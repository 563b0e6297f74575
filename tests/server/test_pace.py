"""When clients come back that have no place, and that each gets its turn."""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from choral_server.pace import GRACE_S, LEAST_S, LONGEST_S, Rhythm, Waiting, comes_back_s, coming
from choral_server.places import Places
from choral_server.records import ClientRecord
from hypothesis import given
from hypothesis import strategies as st

NOON = datetime(2025, 6, 1, 12, tzinfo=UTC)
SOON = Rhythm(next_s=10.0, cycle_s=20.0)
POSITIVE = st.floats(0.01, 1e4)


def at(seconds: float) -> datetime:
    return NOON + timedelta(seconds=seconds)


def returns(line: int, capacity: int, returns_per_s: float, rhythm: Rhythm = SOON) -> list[float]:
    """When those in a line come back, in its order."""
    return [comes_back_s(ahead, capacity, returns_per_s, rhythm) for ahead in range(line)]


@given(st.integers(0, 10_000), st.integers(1, 10_000), POSITIVE, st.floats(0, 1e6), POSITIVE)
def test_a_return_is_planned_within_bounds(ahead: int, capacity: int, returns_per_s: float, next_s: float, cycle_s: float) -> None:
    rhythm = Rhythm(next_s, cycle_s)
    after_s = comes_back_s(ahead, capacity, returns_per_s, rhythm)
    assert LEAST_S <= after_s <= LONGEST_S
    assert after_s <= comes_back_s(ahead + 1, capacity, returns_per_s, rhythm)  # who stands behind comes later


def test_few_come_together_for_the_next_round() -> None:
    assert all(10.0 <= after_s < 10.0 + 8 / 50 for after_s in returns(8, capacity=100, returns_per_s=50))


def test_many_come_one_after_the_other() -> None:
    times = returns(20_000, capacity=20_000, returns_per_s=50)
    assert max(times) - min(times) == pytest.approx(400, rel=1e-3)
    each_second = Counter(int(after_s) for after_s in times)
    assert max(each_second.values()) <= 51


def test_who_stands_behind_comes_a_turn_later() -> None:
    times = returns(30, capacity=10, returns_per_s=50)
    assert [int((after_s - 10.0) // 20) for after_s in times] == [0] * 10 + [1] * 10 + [2] * 10


def test_places_are_kept_for_those_who_waited_longer_and_are_about_to_come() -> None:
    line = [Waiting(at(0), at(100)), Waiting(at(1), at(100 - GRACE_S - 1)), Waiting(at(2), at(121)), Waiting(at(50), at(90))]
    assert coming(line, at(100), SOON, at(40)) == 1  # the others: too late, not soon, came later
    assert coming(line, at(100), SOON, at(60)) == coming(line, at(100), SOON) == 2
    assert coming(line, at(101), SOON) == 3


class Hall:
    """Clients that come to a coordinator with few places, in simulated time: rounds follow each other with all who are there."""

    def __init__(self, clients: int, capacity: int, quorum: int, returns_per_s: float = 50.0) -> None:
        self.names = [f"client-{number}" for number in range(clients)]
        self.known = {name: ClientRecord(name, False, 10, "", "", NOON) for name in self.names}
        self.quorum = quorum
        self.capacity = capacity
        self.busy: set[str] = set()
        self.here: list[str] = []
        self.rounds: list[list[str]] = []
        self.coming = [(0.001 * number, name) for number, name in enumerate(self.names)]
        self.places = Places(capacity, returns_per_s, self.known, self.busy.__contains__, lambda: Rhythm(1.0, 1.0))

    def run(self, rounds: int) -> None:
        """Rounds of a second each; whoever has a place when one opens takes part."""
        now_s, ends_s = 0.0, 0.0
        heapq.heapify(self.coming)
        while len(self.rounds) < rounds:
            if self.busy and (not self.coming or self.coming[0][0] >= ends_s):
                now_s = ends_s
                self._end(now_s)
            else:
                now_s, name = heapq.heappop(self.coming)
                self._come(name, now_s)
            if not self.busy and len(self.here) >= self.quorum:
                self.places.opened(at(now_s))
                self.rounds.append(list(self.here))
                self.busy.update(self.here)
                ends_s = now_s + 1.0

    def _come(self, name: str, now_s: float) -> None:
        leaving = self.places.leaves_for(name, at(now_s))
        if leaving is None:
            self._send_away(name, now_s)
            return
        if leaving:
            self.here.remove(leaving)
            self._send_away(leaving, now_s)
            self.places.leave(leaving)
        self.places.take(name)
        self.here.append(name)
        assert len(self.here) <= self.capacity

    def _end(self, now_s: float) -> None:
        for name in self.busy:
            self.known[name] = replace(self.known[name], accepted=self.known[name].accepted + 1)
        self.busy.clear()
        for name in self.places.turn_over(at(now_s)):
            self.here.remove(name)
            self._send_away(name, now_s)
            self.places.leave(name)

    def _send_away(self, name: str, now_s: float) -> None:
        told, waiting = self.places.send_away(name, at(now_s), "")
        assert told.after_s is not None
        assert abs((waiting.until - at(now_s)).total_seconds() - told.after_s) < 1e-3
        heapq.heappush(self.coming, (now_s + told.after_s, name))


@pytest.mark.parametrize(("clients", "capacity", "quorum"), [(5, 2, 2), (7, 3, 1), (40, 10, 10), (101, 10, 5), (300, 20, 20)])
def test_everyone_gets_a_turn(clients: int, capacity: int, quorum: int) -> None:
    hall = Hall(clients, capacity, quorum)
    turns = -(-clients // quorum)
    hall.run(12 * turns)
    counts = [hall.known[name].accepted for name in hall.names]
    assert min(counts) > 0
    assert all(quorum <= len(there) <= capacity for there in hall.rounds)
    halfway = Counter(name for there in hall.rounds[6 * turns :] for name in there)
    assert set(halfway) == set(hall.names)  # and another one later


def test_nobody_is_sent_away_while_there_are_places() -> None:
    hall = Hall(clients=8, capacity=10, quorum=8)
    hall.run(20)
    assert not hall.coming
    assert all(len(there) == 8 for there in hall.rounds)


def test_who_is_quarantined_makes_room_and_takes_none() -> None:
    hall = Hall(clients=3, capacity=2, quorum=2)
    bad, good, third = hall.names
    hall.known[bad] = replace(hall.known[bad], quarantine="so")
    for name in (bad, good):
        assert hall.places.leaves_for(name, NOON) == ""
        hall.places.take(name)
    assert hall.places.leaves_for(third, NOON) == bad  # though nobody has had a turn
    hall.places.send_away(bad, NOON, "")
    hall.places.leave(bad)
    hall.places.take(third)
    hall.places.opened(NOON)
    assert hall.places.leaves_for(bad, NOON) is None  # though both others have had theirs
    assert hall.places.leaves_for("stranger", NOON) == good


def test_who_works_stays_and_who_has_given_leaves_first() -> None:
    hall = Hall(clients=4, capacity=3, quorum=3)
    a, b, c, d = hall.names
    for name in (a, b, c):
        hall.places.take(name)
    assert hall.places.leaves_for(d, NOON) is None  # nobody has had a turn
    hall.places.opened(NOON)
    hall.busy.update((a, b))
    assert hall.places.leaves_for(d, NOON) == c
    hall.busy.clear()
    assert hall.places.leaves_for(d, NOON) == a
    hall.known[b] = replace(hall.known[b], accepted=1)
    assert hall.places.leaves_for(d, NOON) == b


def test_the_line_outlives_the_process() -> None:
    known = {
        name: ClientRecord(name, False, 10, "", "", NOON, waits_since=since, away_until=at(60))
        for name, since in (("late", at(5)), ("early", at(1)), ("gone", None))
    }
    places = Places(1, 50.0, known, lambda name: False, lambda: SOON)
    assert places.leaves_for("late", at(60)) is None  # the place is kept for who waited longer
    assert places.leaves_for("early", at(60)) == ""
    assert places.send_away("late", at(60), "")[1].since == at(5)


def test_a_place_is_not_kept_for_ever() -> None:
    hall = Hall(clients=2, capacity=1, quorum=1)
    first, second = hall.names
    hall.places.send_away(first, NOON, "")  # and it never comes
    until = hall.places.send_away(first, NOON, "")[1].until
    assert hall.places.leaves_for(second, until) is None
    assert hall.places.leaves_for(second, until + timedelta(seconds=GRACE_S + 1)) == ""
