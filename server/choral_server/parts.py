"""The parts of a round: one client's share each, and all of them together as a value that is cheap to change."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from choral.metrics import Metric


class PartState(enum.Enum):
    """Where one client's part stands."""

    ANNOUNCED = "announced"
    DOWNLOADING = "downloading"
    WORKING = "working"
    READY = "ready"
    UPLOADING = "uploading"
    ABSENT = "absent"
    GONE = "gone"
    ACCEPTED = "accepted"
    DECLINED = "declined"
    REFUSED = "refused"
    CANCELLED = "cancelled"


AT_WORK = frozenset({PartState.ANNOUNCED, PartState.DOWNLOADING, PartState.WORKING, PartState.UPLOADING})
AWAITED = AT_WORK | {PartState.ABSENT}
OPEN_PARTS = AWAITED | {PartState.READY, PartState.GONE}


@dataclass(frozen=True, slots=True)
class Part:
    """One client's part: `examples` is the weight of its accepted result, `digest` the SHA-256 of that result's payload.

    `codec` is how it was asked to encode an update; `payload_bytes` is the length of the accepted one.
    """

    assignment: str
    client: str
    state: PartState = PartState.ANNOUNCED
    reason: str = ""
    examples: int = 0
    held_out: tuple[Metric, ...] = ()
    work: tuple[Metric, ...] = ()
    digest: bytes = b""
    codec: str = ""
    payload_bytes: int = 0


def as_kept(part: Part) -> Part:
    """What of a part outlives the process: how an open one goes does not."""
    if part.state not in OPEN_PARTS or (part.state is PartState.ANNOUNCED and not part.reason):
        return part
    return replace(part, state=PartState.ANNOUNCED, reason="")


class Parts(Mapping[str, Part]):
    """All parts of a round by assignment, in the order in which they were given. It never changes: `having` makes another.

    That one shares with this one what is the same in both, so of n parts one is changed in O(√n), and how many are in a state, or
    which one is a client's, is known at once: a round of n events costs little more than n.
    """

    __slots__ = ("_changed", "_counts", "_given", "_of", "_places")

    def __init__(self, parts: Iterable[Part] = ()) -> None:
        self._given = {part.assignment: part for part in parts}
        self._changed: dict[str, Part] = {}  # in place of those given; at most √n of them, since each change copies it
        self._places = {assignment: place for place, assignment in enumerate(self._given)}
        self._of = {part.client: part.assignment for part in reversed(self._given.values())}
        self._counts = Counter(part.state for part in self._given.values())

    def __getitem__(self, assignment: str) -> Part:
        part = self._changed.get(assignment)
        return part if part is not None else self._given[assignment]

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)

    def __repr__(self) -> str:
        return f"Parts({list(self.values())})"

    def count(self, *states: PartState) -> int:
        """How many are in one of these states."""
        return sum(self._counts[state] for state in states)

    def of(self, client: str) -> Part | None:
        """The client's, if it has one."""
        assignment = self._of.get(client)
        return self[assignment] if assignment is not None else None

    def place(self, assignment: str) -> int:
        """0, 1, 2, … in the order in which they were given."""
        return self._places[assignment]

    def having(self, parts: Iterable[Part]) -> Parts:
        """These in place of those of the same assignments; a further one is the last."""
        changed = {part.assignment: part for part in parts}
        if not changed.keys() <= self._given.keys():
            return Parts({**self, **changed}.values())
        after = Parts.__new__(Parts)
        after._places, after._of = self._places, self._of
        after._counts = self._counts.copy()
        after._counts.subtract(self[assignment].state for assignment in changed)
        after._counts.update(part.state for part in changed.values())
        after._given, after._changed = self._given, {**self._changed, **changed}
        if len(after._changed) ** 2 > len(self._given):
            after._given, after._changed = {**self._given, **after._changed}, {}
        return after

    def since(self, before: Parts) -> list[Part]:
        """Those that are not the same ones in `before`."""
        if self._given is before._given:
            touched: Iterable[str] = sorted({**before._changed, **self._changed}, key=self._places.__getitem__)
        else:
            touched = self
        return [part for part in map(self.__getitem__, touched) if part is not before.get(part.assignment)]
