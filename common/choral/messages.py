"""What coordinator and client say to each other, as values; federation.proto has their meaning, `wire` turns them into protobuf."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from choral.heads import Head
from choral.manifest import Manifest
from choral.metrics import Metric
from choral.plan import Kind, Plan
from choral.sum_messages import FromSummand, ToSummand


@dataclass(frozen=True, slots=True)
class Form:
    """Another file in which a version can be fetched (`forms`); `digest` is the SHA-256 of the checkpoint file that is made of it.

    `base` is that of the checkpoint file which must be at hand; empty: none.
    """

    name: str
    size_bytes: int
    digest: bytes
    base: bytes = b""


@dataclass(frozen=True, slots=True)
class VersionRef:
    """A version as it is announced: its number, and the SHA-256 and length (bytes) of its checkpoint file; `forms` come and go.

    `content` is the file itself, if it is small and was not sent before; otherwise it is to be fetched.
    """

    number: int
    digest: bytes
    size_bytes: int
    content: bytes = field(default=b"", compare=False, repr=False)
    forms: tuple[Form, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Hello:
    """Who a client is and what it can work on. `history` is the newest head that it was handed, if it was handed any.

    `codecs` are its abilities to send an update in other ways than as float32 (`codecs.abilities`). How many `examples` it has, it
    does not say before there is a result, and in a secure sum not even then.
    """

    protocol_version: int
    client: str
    instance: str
    task: str
    task_version: str
    manifest: Manifest
    examples: int = 0
    software: str = ""
    history: Head | None = None
    codecs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Welcome:
    """The client is in. `notice` is for its owner to read; `history` is where the coordinator's history stands."""

    run: str
    heartbeat_s: float
    version: VersionRef
    notice: str = ""
    history: Head | None = None


@dataclass(frozen=True, slots=True)
class Assignment:
    """One client's part in one round; `history` is where the coordinator's history stands.

    `codec` names how an update is to be encoded (`codecs.parse`). It is not in the plan, which is the same for a whole round.
    """

    id: str
    round: int
    version: VersionRef
    plan: Plan
    history: Head | None = None
    codec: str = ""


@dataclass(frozen=True, slots=True)
class Cancel:
    """An assignment's result is no longer wanted."""

    assignment: str
    reason: str


@dataclass(frozen=True, slots=True)
class NewVersion:
    """A version was published."""

    version: VersionRef


@dataclass(frozen=True, slots=True)
class ComeBack:
    """The stream closes. Attend again in `after_s` seconds; None: not at all."""

    after_s: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Keeps the session alive."""


class Phase(enum.Enum):
    """Where an assignment stands, as its client reports it."""

    DOWNLOADING = "downloading"
    WORKING = "working"
    UPLOADING = "uploading"
    DECLINED = "declined"


@dataclass(frozen=True, slots=True)
class Status:
    """How an assignment goes; `reason` says why it was declined."""

    assignment: str
    phase: Phase
    reason: str = ""


FromClient = Hello | Status | Heartbeat | FromSummand
FromCoordinator = Welcome | Assignment | Cancel | NewVersion | ComeBack | ToSummand


@dataclass(frozen=True, slots=True)
class UploadHeader:
    """Announces the result of an assignment: `payload_bytes` bytes laid out as `kind` demands (federation.proto, PayloadKind).

    `digest` is the payload's SHA-256; the chunks begin at byte `offset`. `codec` names how an update is encoded (`codecs.parse`).
    """

    assignment: str
    client: str
    examples: int
    kind: Kind
    payload_bytes: int
    held_out: tuple[Metric, ...]
    work: tuple[Metric, ...]
    digest: bytes
    offset: int = 0
    codec: str = ""


class Verdict(enum.Enum):
    """What became of an upload."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    LATE = "late"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Receipt:
    """The coordinator's answer to an upload."""

    verdict: Verdict
    reason: str = ""
