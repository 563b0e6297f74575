"""Pace steering: who has a place, and when the others come back (Bonawitz et al. 2019, MLSys, section 2.3). Pure.

So many clients may attend at once; the others stand in line. Each is told when to come back: when those before it have had their
turn, one round each. The returns of one turn are spread over as long as it takes at a bearable rate. So few clients come together,
and meet a quorum; many come one after the other, and no herd knocks at once. Who comes back in vain keeps its place in the line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

LEAST_S = 1.0
LONGEST_S = 86_400.0  # what a client takes, and a coordinator may ask: see choral.wire
GRACE_S = 30.0  # for as long a place is kept for one who is due


@dataclass(frozen=True, slots=True)
class Rhythm:
    """What is expected of the rounds: that the next one is over in `next_s` seconds, and another one each `cycle_s` after that."""

    next_s: float
    cycle_s: float


@dataclass(frozen=True, slots=True)
class Waiting:
    """One who was sent away: it stands in line since `since`, and comes back at `until`."""

    since: datetime
    until: datetime


def comes_back_s(client: str, seed: int, ahead: int, line: int, capacity: int, returns_per_s: float, rhythm: Rhythm) -> float:
    """In how many seconds a client is to come back of which `ahead` are before it in a line of `line`, itself included.

    At most `capacity` come in one turn, spread evenly, by a draw from seed and name, at `returns_per_s` on the average.
    """
    turn = ahead // capacity
    spread_s = _group(turn, line, capacity) / returns_per_s
    turn_s = max(rhythm.cycle_s, capacity / returns_per_s)
    after_s = rhythm.next_s + turn * turn_s + _drawn(client, seed, turn) * spread_s
    return min(max(after_s, LEAST_S), LONGEST_S)


def owed(line: Iterable[Waiting], mine: datetime, now: datetime) -> int:
    """How many places are kept for those in line who came before `mine`: who is due, and may still come."""
    grace = timedelta(seconds=GRACE_S)
    return sum(each.since < mine and each.until <= now <= each.until + grace for each in line)


def _group(turn: int, line: int, capacity: int) -> int:
    """How many come back in a turn."""
    return max(1, min(capacity, line - turn * capacity))


def _drawn(client: str, seed: int, turn: int) -> float:
    """Uniform in [0, 1)."""
    drawn = hashlib.sha256(f"{seed}/{turn}/{client}".encode()).digest()
    return int.from_bytes(drawn[:7]) / 2**56
