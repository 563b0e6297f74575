"""Domain values <-> protobuf, and bytes <-> checksummed chunks.

With `status` and the servicers and transports of both sides, the only files that see generated code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message
from google_crc32c import value as crc32c

from choral import sum_wire
from choral.errors import CorruptTransfer, InvalidMessage, ProtocolMismatch
from choral.frames import Piece, frame, unframed
from choral.heads import Head, fault_of
from choral.manifest import Entry, EntryKind, Manifest
from choral.messages import (
    Assignment,
    Cancel,
    ComeBack,
    Form,
    FromClient,
    FromCoordinator,
    Heartbeat,
    Hello,
    NewVersion,
    Phase,
    Receipt,
    Status,
    UploadHeader,
    Verdict,
    VersionRef,
    Welcome,
)
from choral.metrics import Metric
from choral.plan import ExamplePlan, Kind, Plan, PrivatePlan, SecurePlan, Training
from choral.secagg.fixed_point import RINGS
from choral.v1 import federation_pb2 as pb
from choral.v1 import model_pb2 as mb

WORDS = 500  # characters
PROTOCOL_VERSION = 2
_ABILITIES, _FORMS = 32, 8  # of a client, and of a version, that are looked at
_LEAST_NOISE, _MOST_NOISE = 1e-3, 1e6  # over what one can move: what is beyond hides nothing, or everything
_LEAST_CLIP, _MOST_CLIP = 1e-9, 1e9
CHUNK_BYTES = 1 << 20
SMALL_BYTES = 1 << 16  # what is no longer than this travels whole, with the message that tells of it
DIGEST_BYTES = 32
HEARTBEAT_S = 0.1, 3600.0  # what a coordinator may ask for, and its configuration allows
LONGEST_ABSENCE_S = 86_400.0
MESSAGE_BYTES = 4 * CHUNK_BYTES  # the longest message either side accepts: a chunk, or the manifest of a very deep model

_DOWNLOAD_CHUNK, _UPLOAD_CHUNK = 1, 2  # the fields of DownloadResponse and UploadRequest

K = TypeVar("K")
M = TypeVar("M", bound=Message)
V = TypeVar("V")

KINDS = {
    Kind.STATISTICS: mb.ROUND_KIND_STATISTICS,
    Kind.TRAINING: mb.ROUND_KIND_TRAINING,
    Kind.EVALUATION: mb.ROUND_KIND_EVALUATION,
}
_ENTRY_KINDS = {
    EntryKind.AVERAGED: mb.ENTRY_KIND_AVERAGED,
    EntryKind.COUNTER: mb.ENTRY_KIND_COUNTER,
    EntryKind.STATISTIC: mb.ENTRY_KIND_STATISTIC,
}
_PAYLOADS = {
    Kind.STATISTICS: pb.PAYLOAD_KIND_STATISTICS,
    Kind.TRAINING: pb.PAYLOAD_KIND_DELTA,
    Kind.EVALUATION: pb.PAYLOAD_KIND_NONE,
}
_PHASES = {
    Phase.DOWNLOADING: pb.PHASE_DOWNLOADING,
    Phase.WORKING: pb.PHASE_WORKING,
    Phase.UPLOADING: pb.PHASE_UPLOADING,
    Phase.DECLINED: pb.PHASE_DECLINED,
}
_VERDICTS = {
    Verdict.ACCEPTED: pb.VERDICT_ACCEPTED,
    Verdict.DUPLICATE: pb.VERDICT_DUPLICATE,
    Verdict.LATE: pb.VERDICT_LATE,
    Verdict.REFUSED: pb.VERDICT_REFUSED,
}


def _back(table: Mapping[K, V]) -> dict[V, K]:
    return {value: key for key, value in table.items()}


_KINDS_BACK, _ENTRY_KINDS_BACK, _PAYLOADS_BACK = _back(KINDS), _back(_ENTRY_KINDS), _back(_PAYLOADS)
_PHASES_BACK, _VERDICTS_BACK = _back(_PHASES), _back(_VERDICTS)


def _known(table: Mapping[K, V], number: K, what: str) -> V:
    if number not in table:
        raise InvalidMessage(f"{what} {number} is unknown to this release: update Choral on this side")
    return table[number]


# Bytes in chunks


def download_frame(data: bytes, offset: int) -> bytes:
    """A DownloadResponse, encoded: these bytes of the checkpoint file, which begin there at byte `offset`."""
    return frame(_DOWNLOAD_CHUNK, data, offset)


def upload_frame(data: bytes, offset: int) -> bytes:
    """An UploadRequest, encoded: these bytes of the payload, in which they begin at byte `offset`."""
    return frame(_UPLOAD_CHUNK, data, offset)


def read_download(message: bytes) -> Piece:
    """What a DownloadResponse holds. Raises InvalidMessage: it is none."""
    if (piece := unframed(_DOWNLOAD_CHUNK, message)) is not None:
        return piece
    return _piece(_parsed(pb.DownloadResponse, message).chunk)


def read_upload(message: bytes) -> Piece | pb.UploadRequest:
    """A piece of an upload, or another message of one. Raises InvalidMessage: it is none."""
    if (piece := unframed(_UPLOAD_CHUNK, message)) is not None:
        return piece
    request = _parsed(pb.UploadRequest, message)
    return _piece(request.chunk) if request.WhichOneof("message") == "chunk" else request


def _piece(message: mb.Chunk) -> Piece:
    return Piece(message.offset, message.data, message.crc32)


def _parsed(kind: type[M], message: bytes) -> M:
    try:
        return kind.FromString(message)
    except DecodeError as error:
        raise InvalidMessage(f"{len(message)} bytes that are no {kind.DESCRIPTOR.name}: update Choral on this side") from error


def verified(message: Piece, offset: int, total: int) -> bytes:
    """The piece's bytes, if it continues at `offset` and the whole stays within `total` bytes.

    Raises CorruptTransfer: gap, overlap, too much, or a checksum that does not match.
    """
    if message.offset != offset:
        raise CorruptTransfer(f"a chunk begins at byte {message.offset} where byte {offset} is next: send it again")
    if offset + len(message.data) > total:
        raise CorruptTransfer(f"{offset + len(message.data)} bytes arrived where {total} were announced: send it again")
    if crc32c(message.data) != message.crc32:
        raise CorruptTransfer(f"the chunk at byte {offset} does not match its CRC-32C: send it again")
    return message.data


# Parts of messages


def manifest_to_pb(manifest: Manifest) -> mb.Manifest:
    """To protobuf."""
    return mb.Manifest(
        entries=[
            mb.ManifestEntry(name=e.name, dtype=e.dtype, shape=e.shape, offset=e.offset, kind=_ENTRY_KINDS[e.kind])
            for e in manifest.entries
        ]
    )


def manifest_from_pb(message: mb.Manifest) -> Manifest:
    """From protobuf. Raises InvalidMessage: an entry kind that this release does not know."""
    return Manifest(
        tuple(
            Entry(e.name, e.dtype, tuple(e.shape), e.offset, _known(_ENTRY_KINDS_BACK, e.kind, "entry kind"))
            for e in message.entries
        )
    )


def plan_to_pb(plan: Plan) -> pb.Plan:
    """To protobuf."""
    return pb.Plan(
        kind=KINDS[plan.kind],
        task=plan.task,
        task_version=plan.task_version,
        epochs=plan.training.epochs,
        batch_size=plan.training.batch_size,
        learning_rate=plan.training.learning_rate,
        seed=plan.seed,
        evaluate=plan.evaluate,
        cohort=plan.cohort,
        secure=pb.SecurePlan(**asdict(plan.secure)) if plan.secure is not None else None,
        noised=plan.noised,
        private=pb.PrivatePlan(**asdict(plan.private) | _ranges(plan.private)) if plan.private is not None else None,
        examples=pb.ExamplePlan(**asdict(plan.examples) | _ranges(plan.examples)) if plan.examples is not None else None,
    )


def plan_from_pb(message: pb.Plan) -> Plan:
    """From protobuf. Raises InvalidMessage: a round kind or a hyper-parameter that is not allowed."""
    try:
        training = Training(epochs=message.epochs, batch_size=message.batch_size, learning_rate=message.learning_rate)
    except ValueError as error:
        raise InvalidMessage(f"a plan that is not allowed: {error}") from error
    if message.cohort < 0:
        raise InvalidMessage(f"a plan that is not allowed: a cohort of {message.cohort}")
    kind = _known(_KINDS_BACK, message.kind, "round kind")
    task, version = brief(message.task), brief(message.task_version)
    secure = _secure_from_pb(message.secure) if message.HasField("secure") else None
    private = _private_from_pb(message.private) if message.HasField("private") else None
    examples = _examples_from_pb(message.examples) if message.HasField("examples") else None
    if private is not None and examples is not None:
        raise InvalidMessage("a plan that is not allowed: it has noise for clients and for single examples")
    common = training, message.seed, message.evaluate, message.cohort
    return Plan(kind, task, version, *common, secure, message.noised, private, examples)


def _ranges(terms: PrivatePlan | ExamplePlan) -> dict[str, list[pb.Range]]:
    return {"ranges": [pb.Range(least=least, most=most) for least, most in terms.ranges]}


def _must_be(within: str, message: Any, **allowed: bool) -> None:
    """Raises InvalidMessage, which names the first field that is not allowed."""
    for name, good in allowed.items():
        if not good:
            raise InvalidMessage(f"a plan that is not allowed: {within}.{name} is {getattr(message, name)}")


def _ranges_from_pb(within: str, ranges: Iterable[pb.Range]) -> tuple[tuple[float, float], ...]:
    found = tuple((each.least, each.most) for each in ranges)
    for least, most in found:
        if not (-math.inf < least < most < math.inf):
            raise InvalidMessage(f"a plan that is not allowed: {within}.ranges has {least:g} to {most:g}")
    return found


def _private_from_pb(message: pb.PrivatePlan) -> PrivatePlan:
    _must_be(
        "private",
        message,
        noise=_LEAST_NOISE <= message.noise <= _MOST_NOISE,
        clients=message.clients >= 1,
        clip=_LEAST_CLIP <= message.clip <= _MOST_CLIP,
        clip_share=0 <= message.clip_share < 1,
        metrics_share=0 <= message.metrics_share < 1 - message.clip_share,
    )
    shares = message.clip_share, message.metrics_share
    return PrivatePlan(message.noise, message.clients, message.clip, *shares, _ranges_from_pb("private", message.ranges))


def _examples_from_pb(message: pb.ExamplePlan) -> ExamplePlan:
    _must_be(
        "examples",
        message,
        noise=_LEAST_NOISE <= message.noise <= _MOST_NOISE,
        clip=_LEAST_CLIP <= message.clip <= _MOST_CLIP,
        epsilon=0 < message.epsilon < math.inf,
        delta=0 < message.delta < 1,
    )
    terms = message.noise, message.clip, message.epsilon, message.delta
    return ExamplePlan(*terms, _ranges_from_pb("examples", message.ranges))


def _secure_from_pb(message: pb.SecurePlan) -> SecurePlan:
    _must_be(
        "secure",
        message,
        least_clients=message.least_clients >= 1,
        most_clients=message.most_clients >= 1,
        threshold=0 <= message.threshold <= 1,
        clip=0 < message.clip < math.inf,
        ring_bits=message.ring_bits in RINGS,
        weight_cap=message.weight_cap >= 1,
        max_norm=0 <= message.max_norm < math.inf,
    )
    return SecurePlan(
        brief(message.run),
        message.least_clients,
        message.most_clients,
        message.threshold,
        message.clip,
        message.fraction_bits,
        message.ring_bits,
        message.weight_cap,
        message.max_norm,
    )


def version_to_pb(version: VersionRef) -> mb.ModelVersion:
    """To protobuf."""
    forms = [mb.VersionForm(name=f.name, size_bytes=f.size_bytes, digest=f.digest, base=f.base) for f in version.forms]
    number, digest, size_bytes, content = version.number, version.digest, version.size_bytes, version.content
    return mb.ModelVersion(number=number, digest=digest, size_bytes=size_bytes, content=content, forms=forms)


def version_from_pb(message: mb.ModelVersion) -> VersionRef:
    """From protobuf. Raises InvalidMessage: a digest that is none, or a size that cannot be."""
    if len(message.digest) != DIGEST_BYTES:
        raise InvalidMessage(
            f"the digest of version {message.number} has {len(message.digest)} bytes; a SHA-256 has {DIGEST_BYTES}"
        )
    if message.size_bytes < 0:
        raise InvalidMessage(f"version {message.number} is announced with {message.size_bytes} bytes")
    if message.content and len(message.content) != message.size_bytes:
        raise InvalidMessage(
            f"version {message.number} has {message.size_bytes} bytes, and comes with {len(message.content)} of them"
        )
    forms = tuple(Form(brief(f.name), f.size_bytes, f.digest, f.base) for f in message.forms[:_FORMS])
    return VersionRef(message.number, message.digest, message.size_bytes, message.content, forms)


def metrics_to_pb(metrics: Iterable[Metric]) -> list[mb.Metric]:
    """To protobuf."""
    return [mb.Metric(name=m.name, value=m.value, examples=m.examples) for m in metrics]


def metrics_from_pb(messages: Iterable[mb.Metric]) -> tuple[Metric, ...]:
    """From protobuf."""
    return tuple(Metric(m.name, m.value, m.examples) for m in messages)


def head_to_pb(head: Head | None) -> pb.Head | None:
    """To protobuf; None stays absent."""
    if head is None:
        return None
    return pb.Head(sequence=head.sequence, digest=head.digest, signature=head.signature, key=head.key)


def head_from_pb(holder: pb.Hello | pb.Welcome | pb.Assignment) -> Head | None:
    """From the message that holds it, if it holds one. Raises InvalidMessage: a length or a number that is not allowed."""
    if not holder.HasField("history"):
        return None
    message = holder.history
    head = Head(message.sequence, message.digest, message.signature, message.key)
    if (fault := fault_of(head)) is not None:
        raise InvalidMessage(f"a head of the history that is not allowed: {fault}")
    return head


# The attendance stream


def from_client_to_pb(said: FromClient) -> pb.AttendRequest:
    """To protobuf."""
    match said:
        case Hello():
            hello = pb.Hello(
                protocol_version=said.protocol_version,
                client=said.client,
                instance=said.instance,
                task=said.task,
                task_version=said.task_version,
                manifest=manifest_to_pb(said.manifest),
                examples=said.examples,
                software=said.software,
                history=head_to_pb(said.history),
                codecs=said.codecs,
            )
            return pb.AttendRequest(hello=hello)
        case Status():
            status = pb.Status(assignment=said.assignment, phase=_PHASES[said.phase], reason=said.reason)
            return pb.AttendRequest(status=status)
        case Heartbeat():
            return pb.AttendRequest(heartbeat=pb.Heartbeat())
        case _:
            return sum_wire.to_request(said)


def brief(text: str) -> str:
    """A stranger's words, as long as they may be: they are kept, and told to others."""
    return text if len(text) <= WORDS else f"{text[: WORDS - 1]}…"


def from_client_from_pb(message: pb.AttendRequest) -> FromClient:
    """From protobuf. Raises InvalidMessage: nothing is said, or something that this release does not know."""
    match message.WhichOneof("message"):
        case "hello":
            h = message.hello
            if h.protocol_version != PROTOCOL_VERSION:
                raise ProtocolMismatch(
                    f"the client speaks version {h.protocol_version} of the protocol, this coordinator version {PROTOCOL_VERSION}: "
                    "install the same release of Choral on both"
                )
            task, version, software = brief(h.task), brief(h.task_version), brief(h.software)
            manifest, abilities = manifest_from_pb(h.manifest), tuple(brief(name) for name in h.codecs[:_ABILITIES])
            return Hello(
                h.protocol_version,
                h.client,
                brief(h.instance),
                task,
                version,
                manifest,
                h.examples,
                software,
                head_from_pb(h),
                abilities,
            )
        case "status":
            s = message.status
            return Status(brief(s.assignment), _known(_PHASES_BACK, s.phase, "phase"), brief(s.reason))
        case "heartbeat":
            return Heartbeat()
    if (summand := sum_wire.of_request(message)) is not None:
        return summand
    raise InvalidMessage("an attendance message that says nothing known to this release: update Choral on this side")


def from_coordinator_to_pb(said: FromCoordinator) -> pb.AttendResponse:
    """To protobuf."""
    match said:
        case Welcome():
            welcome = pb.Welcome(
                run=said.run,
                heartbeat_s=said.heartbeat_s,
                version=version_to_pb(said.version),
                notice=said.notice,
                history=head_to_pb(said.history),
            )
            return pb.AttendResponse(welcome=welcome)
        case Assignment():
            assignment = pb.Assignment(
                id=said.id,
                round=said.round,
                version=version_to_pb(said.version),
                plan=plan_to_pb(said.plan),
                history=head_to_pb(said.history),
                codec=said.codec,
            )
            return pb.AttendResponse(assignment=assignment)
        case Cancel():
            return pb.AttendResponse(cancel=pb.Cancel(assignment=said.assignment, reason=said.reason))
        case NewVersion():
            return pb.AttendResponse(new_version=pb.NewVersion(version=version_to_pb(said.version)))
        case ComeBack():
            return pb.AttendResponse(come_back=pb.ComeBack(after_s=said.after_s, reason=said.reason))
        case _:
            return sum_wire.to_response(said)


def _seconds(value: float, least: float, most: float, what: str) -> float:
    """A span of time that a coordinator gives, if it is within bounds.

    What is out of bounds is refused and not moved into them: no coordinator that keeps the contract says it, and one that does not
    gains nothing, for it may send a client away for good whenever it likes.
    """
    if not least <= value <= most:
        raise InvalidMessage(f"{what} is {value:g} s; allowed are {least:g} to {most:g}: ask the coordinator's operator")
    return value


def from_coordinator_from_pb(message: pb.AttendResponse) -> FromCoordinator:
    """From protobuf. Raises InvalidMessage: nothing is said, something that this release does not know, or out of all bounds."""
    match message.WhichOneof("message"):
        case "welcome":
            w = message.welcome
            heartbeat_s = _seconds(w.heartbeat_s, *HEARTBEAT_S, "the pause between heartbeats")
            return Welcome(brief(w.run), heartbeat_s, version_from_pb(w.version), brief(w.notice), head_from_pb(w))
        case "assignment":
            a = message.assignment
            plan, head = plan_from_pb(a.plan), head_from_pb(a)
            return Assignment(brief(a.id), a.round, version_from_pb(a.version), plan, head, brief(a.codec))
        case "cancel":
            return Cancel(brief(message.cancel.assignment), brief(message.cancel.reason))
        case "new_version":
            return NewVersion(version_from_pb(message.new_version.version))
        case "come_back":
            c = message.come_back
            after_s = _seconds(c.after_s, 0.0, LONGEST_ABSENCE_S, "the time until the client is to come back")
            return ComeBack(after_s if c.HasField("after_s") else None, brief(c.reason))
    if (of_sum := sum_wire.of_response(message)) is not None:
        return of_sum
    raise InvalidMessage("an attendance message that says nothing known to this release: update Choral on this side")


# Uploads


def header_to_pb(header: UploadHeader, content: bytes = b"") -> pb.UploadHeader:
    """To protobuf, with the whole payload as its `content` if that is small."""
    return pb.UploadHeader(
        assignment=header.assignment,
        client=header.client,
        examples=header.examples,
        payload=_PAYLOADS[header.kind],
        payload_bytes=header.payload_bytes,
        held_out=metrics_to_pb(header.held_out),
        work=metrics_to_pb(header.work),
        digest=header.digest,
        offset=header.offset,
        content=content,
        codec=header.codec,
    )


def header_from_pb(message: pb.UploadHeader) -> UploadHeader:
    """From protobuf. Raises InvalidMessage: a payload kind that this release does not know, or a digest that is none."""
    if len(message.digest) != DIGEST_BYTES:
        raise InvalidMessage(f"the digest of an upload has {len(message.digest)} bytes; a SHA-256 has {DIGEST_BYTES}")
    return UploadHeader(
        assignment=brief(message.assignment),
        client=brief(message.client),
        examples=message.examples,
        kind=_known(_PAYLOADS_BACK, message.payload, "payload kind"),
        payload_bytes=message.payload_bytes,
        held_out=metrics_from_pb(message.held_out),
        work=metrics_from_pb(message.work),
        digest=message.digest,
        offset=message.offset,
        codec=brief(message.codec),
    )


def resumption_to_pb(answer: int | Receipt) -> pb.ResumeUploadResponse:
    """Where a broken upload goes on, or its receipt, to protobuf."""
    if isinstance(answer, Receipt):
        return pb.ResumeUploadResponse(receipt=receipt_to_pb(answer))
    return pb.ResumeUploadResponse(offset=answer)


def resumption_from_pb(message: pb.ResumeUploadResponse) -> int | Receipt:
    """From protobuf. Raises InvalidMessage: a verdict that this release does not know."""
    return receipt_from_pb(message.receipt) if message.WhichOneof("answer") == "receipt" else message.offset


def receipt_to_pb(receipt: Receipt) -> pb.UploadResponse:
    """To protobuf."""
    return pb.UploadResponse(verdict=_VERDICTS[receipt.verdict], reason=receipt.reason)


def receipt_from_pb(message: pb.UploadResponse) -> Receipt:
    """From protobuf. Raises InvalidMessage: a verdict that this release does not know."""
    return Receipt(_known(_VERDICTS_BACK, message.verdict, "verdict"), brief(message.reason))
