"""What the coordinator keeps: runs, versions, clients and events, as frozen values. Rounds are in `rounds`."""

from __future__ import annotations

import enum
import secrets
from dataclasses import dataclass, field
from datetime import datetime

from choral.messages import VersionRef
from choral.metrics import Metric
from choral.plan import Kind
from choral.privacy.accounting import Release

from choral_server.caller import Role, acting
from choral_server.objective import Progress
from choral_server.rounds import Round


class RunState(enum.Enum):
    """Where a run stands."""

    WAITING = "waiting"
    IN_ROUND = "in round"
    PAUSED = "paused"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


OVER = frozenset({RunState.FINISHED, RunState.STOPPED})


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run: how far it is, and why it stands where it stands. `next_round_at` is for readers of the moment and not kept."""

    name: str
    task: str
    task_version: str
    rounds_planned: int
    started_at: datetime
    state: RunState = RunState.WAITING
    reason: str = ""
    rounds_done: int = 0
    next_round: int = 0
    latest: int = 0
    has_statistics: bool = False
    paused: bool = False
    abandoned: int = 0
    """rounds abandoned in a row, the last ones"""
    progress: Progress = Progress()
    next_round_at: datetime | None = None
    opened_at: datetime | None = None
    nonce: str = field(default_factory=lambda: secrets.token_hex(4))
    """what tells the assignments of this run from those of another of the same name"""
    back_to: int | None = None
    """the version that an operator wants to go back to, until that is done"""


@dataclass(frozen=True, slots=True)
class Origin:
    """The version that another was made from."""

    run: str
    number: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """A version: where it is (a path or a URL), and how good. `parent` is told when it is published, and kept by the history."""

    run: str
    version: VersionRef
    checkpoint: str
    published_at: datetime
    test: tuple[Metric, ...] = ()
    clients: tuple[Metric, ...] = ()
    parent: Origin | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class ClientRecord:
    """A client that has ever attended. `accepted` counts its results, `refused` those refused in a row, the last ones.

    `quarantine` says why no result is asked or taken from it; empty: it is not quarantined. `attending` is not kept.
    """

    name: str
    attending: bool
    examples: int
    software: str
    address: str
    heard_at: datetime
    accepted: int = 0
    reason: str = ""
    refused: int = 0
    quarantine: str = ""
    waits_since: datetime | None = None
    """since when it stands in line for a place, if it was sent away; `away_until` is when it is to come back"""
    away_until: datetime | None = None


CENTRAL, DISTRIBUTED, LOCAL = "central", "distributed", "local"  # who adds the noise of a private round


class SpendingState(enum.Enum):
    """Whether what was set aside for a round is spent."""

    RESERVED = "reserved"  # the round is under way, and it counts
    SPENT = "spent"
    RETURNED = "returned"  # the round was abandoned, and nothing of it was released


@dataclass(frozen=True, slots=True)
class SpendingRecord:
    """The privacy that a round costs, written before it opens. Terms as in `Release`; `clip` in the norm of an update.

    Rounds that are not in the database any more, for which an operator answers, are one record of so many `rounds` together, with a
    negative number for `round`.

    `mode` says who adds the noise. `epsilon_models` is what all that counts has cost until then, this round included, for whoever
    cannot know who was drawn; `epsilon_coordinator` for whoever does; both at `delta`. `next_clip` is what the round made of a clip
    that follows the updates.
    """

    run: str
    round: int
    kind: Kind
    at: datetime
    release: Release
    clip: float
    delta: float
    epsilon_models: float
    epsilon_coordinator: float
    state: SpendingState = SpendingState.RESERVED
    next_clip: float | None = None
    rounds: int = 1
    mode: str = CENTRAL


@dataclass(frozen=True, slots=True)
class EventRecord:
    """Something that happened that an operator may want to look up: `what` in a word or two, `told` for the circumstances."""

    at: datetime
    what: str
    told: str = ""
    run: str = ""
    round: int | None = None
    client: str = ""
    by: str = field(default_factory=acting)
    """who did it, if somebody did"""
    id: str = field(default_factory=lambda: secrets.token_hex(8))


@dataclass(frozen=True, slots=True)
class MemberRecord:
    """Somebody who belongs, or did. `key` is the SHA-256 of the public key of its certificate, `signing_key` its Ed25519 key.

    Of somebody with a certificate of another authority, which we did not enrol, only what an operator said is known.
    """

    name: str
    role: Role
    key: bytes = b""
    signing_key: bytes = b""
    enrolled_at: datetime | None = None
    expires_at: datetime | None = None
    """when the newest certificate expires"""
    revoked_at: datetime | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """A token that was handed out: `digest` of its secret, whom it makes a member, and the key of who has used it."""

    digest: str
    name: str
    role: Role
    expires_at: datetime
    replace: bool = False
    used_by: bytes = b""
    void: bool = False


Told = RunRecord | Round | VersionRecord | ClientRecord | EventRecord | MemberRecord | SpendingRecord
"""what those who watch are told of"""
Record = Told | TokenRecord
