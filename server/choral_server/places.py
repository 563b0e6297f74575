"""Who attends when not all can: places, the turns in which clients have them, and the line of those who were sent away."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from choral.messages import ComeBack

from choral_server.pace import Rhythm, Waiting, comes_back_s, coming
from choral_server.records import ClientRecord

FULL = "the coordinator has no place left for more clients at once"
HAD_ITS_TURN = "this client has had its turn, and others wait for theirs"
_OVERDUE_S = 600.0


@dataclass(frozen=True, slots=True)
class Place:
    """Held since so many rounds had opened, and so many results of its client had been accepted."""

    rounds: int
    accepted: int


class Places:
    """At most `capacity` clients have one. `clients` are all that are known, `busy` tells whether one has an open part in a round.

    Who has had its turn, the opening of a round, and is not at work leaves its place to the next that comes; those whose results
    were accepted meanwhile do so first, and before them who is quarantined, since nobody will ask it for anything.
    """

    def __init__(
        self,
        capacity: int,
        returns_per_s: float,
        clients: dict[str, ClientRecord],
        busy: Callable[[str], bool],
        rhythm: Callable[[], Rhythm],
    ) -> None:
        self._capacity = capacity
        self._returns_per_s = returns_per_s
        self._clients = clients
        self._busy = busy
        self._rhythm = rhythm
        self._rounds = 0
        self._held: dict[str, Place] = {}  # who came first is first
        self._line = dict(_waiting(clients.values()))  # who has waited longest is first

    def opened(self, now: datetime) -> None:
        """A round has opened: for all who are here that was their turn. Who is long overdue does not count in the line any more."""
        self._rounds += 1
        self._line = {name: each for name, each in self._line.items() if each.until + timedelta(seconds=_OVERDUE_S) > now}

    def leaves_for(self, client: str, now: datetime) -> str | None:
        """Who must leave so that this client can have a place; empty: nobody; None: there is no place for it."""
        if client in self._held:
            return ""
        mine = self._line[client].since if client in self._line else now
        kept = coming(self._line.values(), now, self._rhythm(), mine)
        free = self._capacity - len(self._held)
        if free > kept:
            return ""
        known = self._clients.get(client)
        if known is not None and known.quarantine:  # whom nobody asks takes no place from others
            return None
        leaving = self._leaving()
        return leaving[0] if leaving and len(leaving) + free > kept else None

    def turn_over(self, now: datetime) -> list[str]:
        """Between two rounds, when nobody is at work: who must leave so that those have places that are about to come."""
        wanted = coming(self._line.values(), now, self._rhythm()) - (self._capacity - len(self._held))
        return self._leaving()[: max(0, wanted)]

    def take(self, client: str) -> None:
        """A client has a place from now on."""
        self._line.pop(client, None)
        known = self._clients.get(client)
        self._held.setdefault(client, Place(self._rounds, known.accepted if known is not None else 0))

    def leave(self, client: str) -> None:
        """It has none any more."""
        self._held.pop(client, None)

    def send_away(self, client: str, now: datetime, reason: str) -> tuple[ComeBack, Waiting]:
        """Let a client stand in line: what it is told, and what is kept of it. Who stood there before keeps its place."""
        before = self._line.get(client)
        since = before.since if before is not None else now
        after_s = comes_back_s(self._ahead(client), self._capacity, self._returns_per_s, self._rhythm())
        self._line[client] = Waiting(since, now + timedelta(seconds=after_s))
        return ComeBack(after_s, reason), self._line[client]

    def _ahead(self, client: str) -> int:
        """How many stand before it in the line."""
        if client not in self._line:
            return len(self._line)
        return next(place for place, name in enumerate(self._line) if name == client)

    def _leaving(self) -> list[str]:
        """Those who can leave, and who first: of several the one that came first."""
        ranked = [(rank, name) for name, place in self._held.items() if (rank := self._rank(name, place)) is not None]
        return [name for _, name in sorted(ranked, key=lambda each: each[0])]

    def _rank(self, name: str, place: Place) -> int | None:
        """Who leaves first; None: this one stays."""
        if self._busy(name):
            return None
        if self._clients[name].quarantine:
            return 0
        if self._clients[name].accepted > place.accepted:
            return 1
        return 2 if self._rounds > place.rounds else None


def _waiting(clients: Iterable[ClientRecord]) -> list[tuple[str, Waiting]]:
    """Those that an earlier process sent away."""
    found = [
        (c.name, Waiting(c.waits_since, c.away_until)) for c in clients if c.waits_since is not None and c.away_until is not None
    ]
    return sorted(found, key=lambda each: each[1].since)
