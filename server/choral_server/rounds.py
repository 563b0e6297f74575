"""The round as a state machine: (round, event) -> (round, actions). Pure: no input or output, no clock, no randomness.

A part, one client's share of the round, moves through these states; once it has ended, no event changes it:

    announced ─ downloading ─ working ─ uploading ──▶ accepted     a verified result arrived; in a secure sum the part is
        │           │            │          │                      `ready` in between, and waits for the others'
        │           └────────────┴──────────┴───────▶ declined     the client will not do it
        │                                        └──▶ refused      the result cannot count
        └──▶ absent ──▶ announced                                  the client left; it came back
                └─────▶ gone ──▶ announced                         it has been away for too long to be waited for; it came back
    anything still open when the round closes ──────▶ cancelled

A result, a decline or a refusal ends a part from any open state, `absent` too: uploads do not need the client's stream.

The round closes when `goal` results are accepted, or when at least `quorum` are and nobody is waited for; it is abandoned when a
quorum has become impossible, at the deadline without one, and when an operator stops it. A closed round is done once what its
results give has been published:

    open ──▶ closed ──▶ done
      └────────┴──────▶ abandoned

At the deadline, parts whose transfer advances may end it; all others that are still open are cut off.

A round whose results are summed securely has two halves. In the first, a client whose result is done shows its keys: its part is
`ready`, and goal, quorum and deadline are about those. With them the sum begins (`summing`); everybody else's part ends. In the
second half masked results are accepted, and `secure_sum` decides when it is over: with the event Summed, or Stopped.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from choral.codecs import MASKED
from choral.messages import Phase, Receipt, Verdict
from choral.metrics import Metric
from choral.plan import Kind

from choral_server.parts import AT_WORK as AT_WORK
from choral_server.parts import AWAITED as AWAITED
from choral_server.parts import OPEN_PARTS as OPEN_PARTS
from choral_server.parts import Part as Part
from choral_server.parts import Parts as Parts
from choral_server.parts import PartState as PartState
from choral_server.parts import as_kept as as_kept


class RoundState(enum.Enum):
    """Where a round stands."""

    OPEN = "open"
    CLOSED = "closed"
    DONE = "done"
    ABANDONED = "abandoned"


_NAMED = 10  # clients named in a reason
_DONE = PartState.READY, PartState.ACCEPTED
ENDED = frozenset({RoundState.DONE, RoundState.ABANDONED})


@dataclass(frozen=True, slots=True)
class Round:
    """A round: `parts` by assignment (any mapping becomes `Parts`), `goal` and `quorum` in results, `duration_s` once it is over.

    `plan` is the digest of what all its clients are asked, `parent` that of the version that it starts from. `summing` says that
    its secure sum has begun, which a restart undoes.
    """

    run: str
    number: int
    kind: Kind
    version: int
    goal: int
    quorum: int
    parts: Parts
    opened_at: datetime
    state: RoundState = RoundState.OPEN
    reason: str = ""
    duration_s: float = 0.0
    plan: bytes = b""
    parent: bytes = b""
    summing: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.parts, Parts):
            object.__setattr__(self, "parts", Parts(self.parts.values()))

    def count(self, *states: PartState) -> int:
        """How many parts are in one of these states."""
        return self.parts.count(*states)

    @property
    def masked(self) -> bool:
        """Whether its results are summed securely."""
        return any(part.codec == MASKED for part in self.parts.values())

    def part_of(self, client: str) -> Part | None:
        """The client's part, if it has one."""
        return self.parts.of(client)


@dataclass(frozen=True, slots=True)
class Upload:
    """A verified result in the spool: the payload is the file at `path`."""

    assignment: str
    client: str
    examples: int
    held_out: tuple[Metric, ...]
    work: tuple[Metric, ...]
    digest: bytes
    path: Path
    payload_bytes: int = 0


def outstanding(round: Round) -> str:
    """Client by client, those without an accepted result, and why; of many the first ones, since each of them may be told."""
    rest = [part for part in round.parts.values() if part.state not in _DONE]
    told = [f"{part.client} {part.state.value}" + (f" ({part.reason})" if part.reason else "") for part in rest[:_NAMED]]
    return "; ".join(told) + (f"; and {len(rest) - _NAMED} more" if len(rest) > _NAMED else "")


def receipt_after(part: Part) -> Receipt:
    """The receipt for a result that arrives after its part has ended."""
    assert part.state not in OPEN_PARTS, f"{part.assignment} is {part.state.value}"
    if part.state is PartState.ACCEPTED:
        return Receipt(Verdict.DUPLICATE, "this result was accepted before and counts once")
    verdict = Verdict.LATE if part.state is PartState.CANCELLED else Verdict.REFUSED
    return Receipt(verdict, f"this part was {part.state.value}: {part.reason}")


def resumed(round: Round) -> Round:
    """The round as a coordinator finds it that starts again: whoever had not ended their part is away until they return."""
    away = [
        replace(part, state=PartState.ABSENT, reason="the coordinator restarted")
        for part in round.parts.values()
        if part.state in OPEN_PARTS
    ]
    return replace(round, parts=round.parts.having(away))


def without(round: Round, lost: Iterable[Part]) -> Round:
    """The round after the results of these accepted parts were lost: it is open, and they are asked for again."""
    away = [Part(part.assignment, part.client, PartState.ABSENT, "its result was lost", codec=part.codec) for part in lost]
    return replace(round, state=RoundState.OPEN, parts=round.parts.having(away))


def published(round: Round) -> Round:
    """A closed round whose results have been used."""
    assert round.state is RoundState.CLOSED, f"round {round.number} is {round.state.value}"
    return replace(round, state=RoundState.DONE)


def discarded(round: Round, why: str) -> Round:
    """A round that is given up from outside, open or closed."""
    assert round.state not in ENDED, f"round {round.number} is {round.state.value}"
    return replace(_cancel(round, f"round {round.number} was given up: {why}")[0], state=RoundState.ABANDONED, reason=why)


# Events


@dataclass(frozen=True, slots=True)
class Reported:
    """A client says how its part goes."""

    assignment: str
    phase: Phase
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Ready:
    """A client's result is done, and it has shown its keys for the secure sum."""

    assignment: str


@dataclass(frozen=True, slots=True)
class Summed:
    """The masks are off the sum of the accepted results."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """A result arrived whole and was found admissible."""

    upload: Upload


@dataclass(frozen=True, slots=True)
class Rejected:
    """A result arrived that cannot count."""

    assignment: str
    reason: str


@dataclass(frozen=True, slots=True)
class Left:
    """A client's session ended."""

    client: str


@dataclass(frozen=True, slots=True)
class Overdue:
    """A client has been away for too long to be waited for."""

    client: str


@dataclass(frozen=True, slots=True)
class Returned:
    """A client attends again."""

    client: str


@dataclass(frozen=True, slots=True)
class Recruited:
    """Another client takes part, in place of one that is not there or will not do it."""

    part: Part


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """Time is up, except for the assignments whose transfer is `advancing`."""

    deadline_s: float
    advancing: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Stopped:
    """The round must end now."""

    reason: str


Event = Reported | Ready | Summed | Arrived | Rejected | Left | Overdue | Returned | Recruited | DeadlinePassed | Stopped


# Actions


@dataclass(frozen=True, slots=True)
class Announce:
    """Tell the client of its part."""

    part: Part


@dataclass(frozen=True, slots=True)
class Answer:
    """Give the receipt for an upload."""

    upload: Upload
    receipt: Receipt


@dataclass(frozen=True, slots=True)
class Fold:
    """Add an accepted upload to the aggregate."""

    upload: Upload


@dataclass(frozen=True, slots=True)
class BeginSum:
    """Lead these parts, which are ready, through the secure sum."""

    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Remind:
    """Say again to a client in the secure sum what it is waiting for: it was away."""

    part: Part


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Tell the client that its part is no longer wanted."""

    part: Part


@dataclass(frozen=True, slots=True)
class Extend:
    """Look again soon whether the transfers that were advancing at the deadline have ended or stand still."""


Action = Announce | Answer | Fold | BeginSum | Remind | Withdraw | Extend
Step = tuple[Round, tuple[Action, ...]]


def step(round: Round, event: Event) -> Step:
    """What `event` makes of the round, and what must be done once that is stored."""
    after, actions = _HANDLERS[type(event)](round, event)
    settled, closing = _settle(after)
    return settled, (*actions, *closing)


def _reported(round: Round, event: Reported) -> Step:
    part = round.parts.get(event.assignment)
    if part is None or part.state not in OPEN_PARTS:
        return round, ()
    if round.summing and event.phase is not Phase.DECLINED:
        return round, ()  # it is ready until its result has arrived
    return _with(round, replace(part, state=PartState(event.phase.value), reason=event.reason)), ()


def _ready(round: Round, event: Ready) -> Step:
    part = round.parts.get(event.assignment)
    if part is None or part.state not in OPEN_PARTS or round.summing or round.state is not RoundState.OPEN:
        return round, ()
    return _with(round, replace(part, state=PartState.READY, reason="")), ()


def _summed(round: Round, event: Summed) -> Step:
    if not round.summing:
        return round, ()
    return _close(round, RoundState.CLOSED, "the masks are off the sum")


def _arrived(round: Round, event: Arrived) -> Step:
    upload = event.upload
    part = round.parts.get(upload.assignment)
    if part is None or part.client != upload.client:
        reason = f"assignment {upload.assignment} was not given to {upload.client} in round {round.number}"
        return round, (Answer(upload, Receipt(Verdict.REFUSED, reason)),)
    if part.state not in OPEN_PARTS:
        return round, (Answer(upload, receipt_after(part)),)
    accepted = replace(
        part,
        state=PartState.ACCEPTED,
        reason="",
        examples=upload.examples,
        held_out=upload.held_out,
        work=upload.work,
        digest=upload.digest,
        payload_bytes=upload.payload_bytes,
    )
    return _with(round, accepted), (Answer(upload, Receipt(Verdict.ACCEPTED)), Fold(upload))


def _rejected(round: Round, event: Rejected) -> Step:
    part = round.parts.get(event.assignment)
    if part is None or part.state not in OPEN_PARTS:
        return round, ()
    return _with(round, replace(part, state=PartState.REFUSED, reason=event.reason)), ()


def _left(round: Round, event: Left) -> Step:
    part = round.part_of(event.client)
    if part is None or part.state not in AT_WORK | {PartState.READY} or round.summing:
        return round, ()
    return _with(round, replace(part, state=PartState.ABSENT, reason="the client left")), ()


def _overdue(round: Round, event: Overdue) -> Step:
    part = round.part_of(event.client)
    if part is None or part.state is not (PartState.READY if round.summing else PartState.ABSENT):
        return round, ()
    return _with(round, replace(part, state=PartState.GONE, reason="the client left")), ()


def _returned(round: Round, event: Returned) -> Step:
    part = round.part_of(event.client)
    if part is not None and round.summing and round.state is RoundState.OPEN:
        return round, (Remind(part),)
    if part is None or part.state not in OPEN_PARTS:
        return round, ()
    back = replace(part, state=PartState.ANNOUNCED, reason="")
    return _with(round, back), (Announce(back),)


def _recruited(round: Round, event: Recruited) -> Step:
    if round.state is not RoundState.OPEN or round.summing or event.part.assignment in round.parts:
        return round, ()
    return _with(round, event.part), (Announce(event.part),)


def _deadline_passed(round: Round, event: DeadlinePassed) -> Step:
    why = f"the deadline of {event.deadline_s:g} s passed"
    if round.summing:
        return round, ()  # whose steps have times of their own
    ready = {part.assignment for part in round.parts.values() if part.state is PartState.READY}
    advancing = {part.assignment for part in round.parts.values() if part.state in OPEN_PARTS} & event.advancing - ready
    if advancing and round.state is RoundState.OPEN:
        cut, withdrawals = _cancel(round, why, spared=advancing | ready)
        return cut, (*withdrawals, Extend())
    if round.count(*_DONE) >= round.quorum:
        return _enough(round, why)
    return _close(round, RoundState.ABANDONED, f"{why}: {_missing(round)}")


def _stopped(round: Round, event: Stopped) -> Step:
    return _close(round, RoundState.ABANDONED, event.reason)


_HANDLERS: dict[type[Any], Callable[[Round, Any], Step]] = {
    Reported: _reported,
    Ready: _ready,
    Summed: _summed,
    Arrived: _arrived,
    Rejected: _rejected,
    Left: _left,
    Overdue: _overdue,
    Returned: _returned,
    Recruited: _recruited,
    DeadlinePassed: _deadline_passed,
    Stopped: _stopped,
}


def _settle(round: Round) -> Step:
    """Close the round, or begin with its sum, if its fate is decided."""
    if round.state is not RoundState.OPEN or round.summing:
        return round, ()
    done = round.count(*_DONE)
    if done >= round.goal:
        return _enough(round, "the goal was reached")
    if done + round.count(*AWAITED, PartState.GONE) < round.quorum:
        return _close(round, RoundState.ABANDONED, _missing(round))
    if done >= round.quorum and round.count(*AWAITED) == 0:
        return _enough(round, "everyone still here had answered")
    return round, ()


def _enough(round: Round, why: str) -> Step:
    """There are enough results: the round closes; or its secure sum begins, with those who are ready."""
    ready = tuple(part for part in round.parts.values() if part.state is PartState.READY)
    if not ready:
        return _close(round, RoundState.CLOSED, why)
    others = f"the sum of round {round.number} began without it: {why}"
    cut, withdrawals = _cancel(round, others, spared=frozenset(part.assignment for part in ready))
    return replace(cut, summing=True), (*withdrawals, BeginSum(ready))


def _close(round: Round, state: RoundState, why: str) -> Step:
    if round.state is not RoundState.OPEN:
        return round, ()
    cancelled, withdrawals = _cancel(round, f"round {round.number} closed: {why}")
    return replace(cancelled, state=state, reason=why if state is RoundState.ABANDONED else ""), withdrawals


def _cancel(round: Round, why: str, spared: AbstractSet[str] = frozenset()) -> Step:
    """End all open parts but those spared."""
    cancelled = [
        replace(part, state=PartState.CANCELLED, reason=why)
        for part in round.parts.values()
        if part.state in OPEN_PARTS and part.assignment not in spared
    ]
    return replace(round, parts=round.parts.having(cancelled)), tuple(map(Withdraw, cancelled))


def _missing(round: Round) -> str:
    """Why there is no quorum."""
    done = f"{round.count(*_DONE)} {'ready' if round.masked else 'accepted'}"
    return f"quorum of {round.quorum} missed with {done}: {outstanding(round)}"


def _with(round: Round, part: Part) -> Round:
    return replace(round, parts=round.parts.having([part]))
