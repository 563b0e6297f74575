"""Pace steering: who has a place, and when the others come back (Bonawitz et al. 2019, MLSys, section 2.3). Pure.

So many clients may attend at once; the others stand in line. Each is told when to come back: when those before it have had their
turn, one round each. The returns of one turn are spread over as long as it takes at a bearable rate. So few clients come together,
and meet a quorum; many come one after the other, and no herd knocks at once. Who comes back in vain keeps its place in the line.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

LEAST_S = 1.0
LONGEST_S = 86_400.0  # what a client takes, and a coordinator may ask: see choral.wire
GRACE_S = 30.0  # for as long a place is kept for one who is due, and at most before that


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


def comes_back_s(ahead: int, capacity: int, returns_per_s: float, rhythm: Rhythm) -> float:
    """In how many seconds a client is to come back that has `ahead` others before it in the line.

    At most `capacity` come in one turn, one after the other at `returns_per_s`, who has waited longest first.
    """
    turn, place = divmod(ahead, capacity)
    turn_s = max(rhythm.cycle_s, capacity / returns_per_s)
    return min(max(rhythm.next_s + turn * turn_s, LEAST_S) + place / returns_per_s, LONGEST_S)


def coming(line: Iterable[Waiting], now: datetime, rhythm: Rhythm, before: datetime | None = None) -> int:
    """How many of those in line are about to come, or due and may still; only those who stand in it since `before`, if given."""
    grace = timedelta(seconds=GRACE_S)
    soon = min(grace, timedelta(seconds=rhythm.cycle_s))
    return sum(now - grace <= each.until <= now + soon and (before is None or each.since < before) for each in line)
