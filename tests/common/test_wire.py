from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, TypeVar

import pytest
from choral import wire
from choral.errors import CorruptTransfer, InvalidMessage, ProtocolMismatch
from choral.frames import Piece
from choral.heads import Head
from choral.manifest import Entry, EntryKind, Manifest
from choral.messages import (
    Assignment,
    Cancel,
    ComeBack,
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
from choral.plan import ExamplePlan, Kind, Plan, PrivatePlan, SecurePlan, Training, digest_of
from choral.secagg.keys import Shown
from choral.secagg.roster import Advert
from choral.secagg.shamir import PRIME
from choral.sum_messages import SumAdvert, SumRevealed, SumRoster, SumShares, SumSignature, SumSignatures, SumSurvivors
from choral.v1 import federation_pb2 as pb
from choral.v1 import model_pb2 as mb
from google.protobuf.message import Message
from google_crc32c import value as crc32c
from hypothesis import given
from hypothesis import strategies as st
from pieces import piece, taken

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
M = TypeVar("M", bound=Message)
INT64 = st.integers(-(2**63), 2**63 - 1)
COUNT = st.integers(0, 2**63 - 1)
NUMBER = st.floats(allow_nan=False)
ENTRIES = st.builds(
    Entry,
    name=TEXT,
    dtype=TEXT,
    shape=st.lists(COUNT, max_size=4).map(tuple),
    offset=COUNT,
    kind=st.sampled_from(EntryKind),
)
MANIFESTS = st.builds(Manifest, st.lists(ENTRIES, max_size=4).map(tuple))
VERSIONS = st.builds(VersionRef, number=COUNT, digest=st.binary(min_size=32, max_size=32), size_bytes=COUNT)
HEADS = st.none() | st.builds(
    Head,
    sequence=st.integers(1, 2**63 - 1),
    digest=st.binary(min_size=32, max_size=32),
    signature=st.binary(min_size=64, max_size=64),
    key=st.binary(min_size=32, max_size=32),
)
METRICS = st.lists(st.builds(Metric, name=TEXT, value=NUMBER, examples=INT64), max_size=3).map(tuple)
TRAININGS = st.builds(
    Training,
    epochs=st.integers(0, 100_000),
    batch_size=st.integers(1, 1_000_000),
    learning_rate=st.floats(0, exclude_min=True, allow_infinity=False, allow_nan=False),
)
SECURES = st.builds(
    SecurePlan,
    run=TEXT,
    least_clients=st.integers(1, 2**31 - 1),
    most_clients=st.integers(1, 2**31 - 1),
    threshold=st.floats(0, 1),
    clip=st.floats(0, exclude_min=True, allow_infinity=False),
    fraction_bits=st.integers(-(2**31), 2**31 - 1),
    ring_bits=st.sampled_from([32, 64]),
    weight_cap=st.integers(1, 2**63 - 1),
    max_norm=st.floats(0, allow_infinity=False),
)
PLANS = st.builds(
    Plan,
    kind=st.sampled_from(Kind),
    task=TEXT,
    task_version=TEXT,
    training=TRAININGS,
    seed=st.integers(0, 2**64 - 1),
    evaluate=st.booleans(),
    cohort=st.integers(0, 2**31 - 1),
    secure=st.none() | SECURES,
)
SHARES = st.dictionaries(TEXT, st.integers(0, PRIME - 1), max_size=3)
ADVERTS = st.builds(
    Advert,
    client=TEXT,
    shown=st.builds(Shown, mask_key=st.binary(max_size=32), share_key=st.binary(max_size=32), commitment=st.binary(max_size=32)),
    key=st.binary(max_size=32),
    signature=st.binary(max_size=64),
    voucher=st.binary(max_size=20),
)
BY_NAME = st.dictionaries(TEXT, st.binary(max_size=20), max_size=3)
HELLOS = st.builds(
    Hello,
    protocol_version=st.just(wire.PROTOCOL_VERSION),
    client=TEXT,
    instance=TEXT,
    task=TEXT,
    task_version=TEXT,
    manifest=MANIFESTS,
    examples=INT64,
    software=TEXT,
    history=HEADS,
    codecs=st.lists(TEXT, max_size=3).map(tuple),
)
FROM_CLIENT = {
    "hello": HELLOS,
    "status": st.builds(Status, assignment=TEXT, phase=st.sampled_from(Phase), reason=TEXT),
    "heartbeat": st.just(Heartbeat()),
    "sum_advert": st.builds(SumAdvert, assignment=TEXT, advert=ADVERTS),
    "sum_shares": st.builds(SumShares, assignment=TEXT, sealed=BY_NAME),
    "sum_signature": st.builds(SumSignature, assignment=TEXT, signature=st.binary(max_size=64)),
    "sum_revealed": st.builds(SumRevealed, assignment=TEXT, mask_seeds=SHARES, key_seeds=SHARES),
}
FROM_COORDINATOR = {
    "welcome": st.builds(Welcome, run=TEXT, heartbeat_s=st.floats(0.1, 3600.0), version=VERSIONS, history=HEADS),
    "assignment": st.builds(Assignment, id=TEXT, round=COUNT, version=VERSIONS, plan=PLANS, history=HEADS, codec=TEXT),
    "cancel": st.builds(Cancel, assignment=TEXT, reason=TEXT),
    "new_version": st.builds(NewVersion, version=VERSIONS),
    "come_back": st.builds(ComeBack, after_s=st.none() | st.floats(0.0, 86_400.0), reason=TEXT),
    "sum_roster": st.builds(SumRoster, assignment=TEXT, adverts=st.lists(ADVERTS, max_size=3).map(tuple)),
    "sum_shares": st.builds(SumShares, assignment=TEXT, sealed=BY_NAME),
    "sum_survivors": st.builds(SumSurvivors, assignment=TEXT, clients=st.lists(TEXT, max_size=3).map(tuple)),
    "sum_signatures": st.builds(SumSignatures, assignment=TEXT, signatures=BY_NAME),
}
HEADERS = st.builds(
    UploadHeader,
    assignment=TEXT,
    client=TEXT,
    examples=INT64,
    kind=st.sampled_from(Kind),
    payload_bytes=COUNT,
    held_out=METRICS,
    work=METRICS,
    digest=st.binary(min_size=wire.DIGEST_BYTES, max_size=wire.DIGEST_BYTES),
    offset=COUNT,
    codec=TEXT,
)
RECEIPTS = st.builds(Receipt, verdict=st.sampled_from(Verdict), reason=TEXT)


def _sent(message: M) -> M:
    """The message after a trip as bytes."""
    return type(message).FromString(message.SerializeToString())


@pytest.mark.parametrize("name", pb.AttendRequest.DESCRIPTOR.fields_by_name)
@given(data=st.data())
def test_what_clients_say_round_trips(name: str, data: st.DataObject) -> None:
    said = data.draw(FROM_CLIENT[name])
    message = wire.from_client_to_pb(said)
    assert message.WhichOneof("message") == name
    assert wire.from_client_from_pb(_sent(message)) == said


@pytest.mark.parametrize("name", pb.AttendResponse.DESCRIPTOR.fields_by_name)
@given(data=st.data())
def test_what_the_coordinator_says_round_trips(name: str, data: st.DataObject) -> None:
    said = data.draw(FROM_COORDINATOR[name])
    message = wire.from_coordinator_to_pb(said)
    assert message.WhichOneof("message") == name
    assert wire.from_coordinator_from_pb(_sent(message)) == said


@given(HEADERS)
def test_upload_headers_round_trip(header: UploadHeader) -> None:
    assert wire.header_from_pb(_sent(wire.header_to_pb(header))) == header


@given(RECEIPTS)
def test_receipts_round_trip(receipt: Receipt) -> None:
    assert wire.receipt_from_pb(_sent(wire.receipt_to_pb(receipt))) == receipt


@given(COUNT | RECEIPTS)
def test_where_an_upload_goes_on_round_trips(answer: int | Receipt) -> None:
    message = wire.resumption_to_pb(answer)
    assert message.WhichOneof("answer") == ("receipt" if isinstance(answer, Receipt) else "offset")
    assert wire.resumption_from_pb(_sent(message)) == answer


def test_an_answer_that_says_nothing_begins_again() -> None:
    assert wire.resumption_from_pb(pb.ResumeUploadResponse()) == 0


@pytest.mark.parametrize("length", [0, 20, 31, 33, 64])
def test_a_digest_that_is_none_is_refused(length: int) -> None:
    with pytest.raises(InvalidMessage, match=f"the digest of an upload has {length} bytes; a SHA-256 has 32"):
        wire.header_from_pb(pb.UploadHeader(payload=pb.PAYLOAD_KIND_DELTA, digest=bytes(length)))


def test_never_and_at_once_are_told_apart() -> None:
    for after_s in (None, 0.0):
        message = wire.from_coordinator_to_pb(ComeBack(after_s, "over"))
        assert wire.from_coordinator_from_pb(message) == ComeBack(after_s, "over")


def test_an_undefined_metric_arrives_as_such() -> None:
    (metric,) = wire.metrics_from_pb(wire.metrics_to_pb([Metric("loss", math.nan, 3)]))
    assert math.isnan(metric.value)


@pytest.mark.parametrize(
    "wrong", [{"sequence": 0}, {"sequence": -1}, {"digest": bytes(31)}, {"signature": b""}, {"key": bytes(33)}]
)
def test_a_head_that_can_be_none_is_refused(wrong: dict[str, Any]) -> None:
    head = pb.Head(**{"sequence": 1, "digest": bytes(32), "signature": bytes(64), "key": bytes(32)} | wrong)
    with pytest.raises(InvalidMessage, match="a head of the history that is not allowed: "):
        wire.from_coordinator_from_pb(
            pb.AttendResponse(welcome=pb.Welcome(heartbeat_s=1, version=mb.ModelVersion(digest=bytes(32)), history=head))
        )
    with pytest.raises(InvalidMessage, match="a head of the history that is not allowed: "):
        wire.from_client_from_pb(pb.AttendRequest(hello=pb.Hello(protocol_version=wire.PROTOCOL_VERSION, history=head)))


# What another release may send


@pytest.mark.parametrize("theirs", [0, 1, 3, 99])
def test_another_protocol_version_is_refused_and_both_are_named(theirs: int) -> None:
    hello = pb.Hello(protocol_version=theirs, client="alice", manifest=mb.Manifest(entries=[mb.ManifestEntry(kind=77)]))
    with pytest.raises(ProtocolMismatch) as refused:
        wire.from_client_from_pb(pb.AttendRequest(hello=hello))
    told = str(refused.value)
    assert f"the client speaks version {theirs} of the protocol, this coordinator version {wire.PROTOCOL_VERSION}" in told


def test_messages_that_say_nothing_known_are_refused() -> None:
    later = b"\xfa\x07\x00"  # field 127, of a release to come
    with pytest.raises(InvalidMessage, match="says nothing known to this release"):
        wire.from_client_from_pb(pb.AttendRequest.FromString(later))
    with pytest.raises(InvalidMessage, match="says nothing known to this release"):
        wire.from_coordinator_from_pb(pb.AttendResponse.FromString(later))


@pytest.mark.parametrize("number", [0, 77])
def test_unknown_enum_values_are_refused_by_name(number: int) -> None:
    with pytest.raises(InvalidMessage, match=f"phase {number} is unknown to this release"):
        wire.from_client_from_pb(pb.AttendRequest(status=pb.Status(phase=number)))
    with pytest.raises(InvalidMessage, match=f"payload kind {number} is unknown"):
        wire.header_from_pb(pb.UploadHeader(payload=number, digest=bytes(32)))
    with pytest.raises(InvalidMessage, match=f"verdict {number} is unknown"):
        wire.receipt_from_pb(pb.UploadResponse(verdict=number))
    with pytest.raises(InvalidMessage, match=f"verdict {number} is unknown"):
        wire.resumption_from_pb(pb.ResumeUploadResponse(receipt=pb.UploadResponse(verdict=number)))
    with pytest.raises(InvalidMessage, match=f"round kind {number} is unknown"):
        wire.plan_from_pb(pb.Plan(kind=number, batch_size=1, learning_rate=0.1))
    with pytest.raises(InvalidMessage, match=f"entry kind {number} is unknown"):
        wire.manifest_from_pb(mb.Manifest(entries=[mb.ManifestEntry(kind=number)]))


@pytest.mark.parametrize(
    ("field", "value"),
    [("epochs", -1), ("batch_size", 0), ("learning_rate", 0.0), ("learning_rate", math.nan), ("cohort", -1)],
)
def test_a_plan_that_cannot_work_is_refused(field: str, value: float) -> None:
    plan = pb.Plan(kind=mb.ROUND_KIND_TRAINING, epochs=1, batch_size=1, learning_rate=0.1)
    assert wire.plan_from_pb(plan).training.epochs == 1
    setattr(plan, field, value)
    with pytest.raises(InvalidMessage, match=f"(?s)a plan that is not allowed: .*{field}"):
        wire.plan_from_pb(plan)


SECURE = {
    **{"run": "run/1", "least_clients": 3, "most_clients": 10, "threshold": 0.0, "clip": 8.0, "fraction_bits": 24, "ring_bits": 32},
    **{"weight_cap": 4096, "max_norm": 0.0},
}


def test_the_terms_of_a_secure_sum_arrive_as_they_are() -> None:
    plan = pb.Plan(kind=mb.ROUND_KIND_TRAINING, batch_size=1, learning_rate=0.1)
    assert wire.plan_from_pb(plan).secure is None
    plan.secure.CopyFrom(pb.SecurePlan(**SECURE))
    assert wire.plan_from_pb(plan).secure == SecurePlan(**SECURE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("least_clients", 0),
        ("most_clients", -1),
        ("threshold", -0.1),
        ("threshold", 1.1),
        ("threshold", math.nan),
        ("clip", 0.0),
        ("clip", math.inf),
        ("clip", math.nan),
        ("ring_bits", 0),
        ("ring_bits", 16),
        ("weight_cap", 0),
        ("weight_cap", -1),
        ("max_norm", -1.0),
        ("max_norm", math.inf),
        ("max_norm", math.nan),
    ],
)
def test_terms_of_a_secure_sum_that_cannot_be_are_refused(field: str, value: float) -> None:
    secure = pb.SecurePlan(**SECURE | {field: value})
    with pytest.raises(InvalidMessage, match=rf"^a plan that is not allowed: secure\.{field} is {value}$"):
        wire.plan_from_pb(pb.Plan(kind=mb.ROUND_KIND_TRAINING, batch_size=1, learning_rate=0.1, secure=secure))


PRIVATE = {"noise": 1.5, "clients": 4, "clip": 0.5, "clip_share": 0.02, "metrics_share": 0.1}
HIDING = {"noise": 1.5, "clip": 0.5, "epsilon": 8.0, "delta": 1e-5}
BOTH_RANGES = ((0.0, 10.0), (-1.0, 1.0))


@pytest.mark.parametrize(("name", "kind", "terms"), [("private", PrivatePlan, PRIVATE), ("examples", ExamplePlan, HIDING)])
def test_the_noise_that_clients_add_travels_with_the_plan(name: str, kind: Any, terms: dict[str, Any]) -> None:
    plan = Plan(Kind.TRAINING, "t", "1", Training(), 7, evaluate=True, noised=True, **{name: kind(**terms, ranges=BOTH_RANGES)})
    assert wire.plan_from_pb(wire.plan_to_pb(plan)) == plan
    without = replace(plan, **{name: None})
    assert wire.plan_from_pb(wire.plan_to_pb(without)) == without
    assert len({digest_of(plan), digest_of(without), digest_of(replace(plan, **{name: kind(**terms)}))}) == 3


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        *(("private", "noise", bad) for bad in (0.0, 1e-4, -1.0, 1e7, math.inf, math.nan)),
        *(("private", "clip", bad) for bad in (0.0, -1.0, 1e300, math.nan)),
        *(("private", "clients", bad) for bad in (0, -1)),
        *(("private", "clip_share", bad) for bad in (-0.1, 1.0, math.nan)),
        *(("private", "metrics_share", bad) for bad in (-0.1, 0.98, math.nan)),
        *(("examples", "noise", bad) for bad in (0.0, 1e-4, math.nan)),
        *(("examples", "clip", bad) for bad in (0.0, 1e300, math.nan)),
        *(("examples", "epsilon", bad) for bad in (0.0, -1.0, math.inf, math.nan)),
        *(("examples", "delta", bad) for bad in (0.0, 1.0, math.nan)),
    ],
)
def test_noise_that_hides_nothing_is_not_allowed(name: str, field: str, value: float) -> None:
    terms: Any = pb.PrivatePlan(**PRIVATE) if name == "private" else pb.ExamplePlan(**HIDING)
    setattr(terms, field, value)
    with pytest.raises(InvalidMessage, match=rf"^a plan that is not allowed: {name}\.{field} is "):
        wire.plan_from_pb(pb.Plan(kind=mb.ROUND_KIND_TRAINING, batch_size=1, learning_rate=0.1, **{name: terms}))


def test_noise_for_both_is_not_allowed() -> None:
    both = {"private": pb.PrivatePlan(**PRIVATE), "examples": pb.ExamplePlan(**HIDING)}
    with pytest.raises(InvalidMessage, match="it has noise for clients and for single examples"):
        wire.plan_from_pb(pb.Plan(kind=mb.ROUND_KIND_TRAINING, batch_size=1, learning_rate=0.1, **both))


@pytest.mark.parametrize("bad", [(1.0, 1.0), (2.0, 1.0), (math.nan, 1.0), (0.0, math.inf)])
def test_a_range_that_is_none_is_not_allowed(bad: tuple[float, float]) -> None:
    terms = pb.PrivatePlan(**PRIVATE, ranges=[pb.Range(least=bad[0], most=bad[1])])
    with pytest.raises(InvalidMessage, match=r"^a plan that is not allowed: private\.ranges has "):
        wire.plan_from_pb(pb.Plan(kind=mb.ROUND_KIND_TRAINING, batch_size=1, learning_rate=0.1, private=terms))


# What a coordinator may not say, whoever it is

VERSION = mb.ModelVersion(number=3, digest=bytes(32), size_bytes=100)


def _heard(message: pb.AttendResponse) -> object:
    return wire.from_coordinator_from_pb(_sent(message))


@pytest.mark.parametrize("heartbeat_s", [0.1, 15.0, 3600.0])
def test_heartbeats_that_can_be_asked_for(heartbeat_s: float) -> None:
    welcome = _heard(pb.AttendResponse(welcome=pb.Welcome(heartbeat_s=heartbeat_s, version=VERSION)))
    assert isinstance(welcome, Welcome)
    assert welcome.heartbeat_s == heartbeat_s


@pytest.mark.parametrize("heartbeat_s", [0.0, -1.0, 0.09, 3600.1, 1e300, math.inf, -math.inf, math.nan])
def test_heartbeats_that_cannot(heartbeat_s: float) -> None:
    message = pb.AttendResponse(welcome=pb.Welcome(heartbeat_s=heartbeat_s, version=VERSION))
    with pytest.raises(
        InvalidMessage, match=r"the pause between heartbeats is .* s; allowed are 0.1 to 3600: ask the coordinator's"
    ):
        _heard(message)


@pytest.mark.parametrize("after_s", [0.0, 1.0, 86_400.0])
def test_absences_that_can_be_asked_for(after_s: float) -> None:
    assert _heard(pb.AttendResponse(come_back=pb.ComeBack(after_s=after_s))) == ComeBack(after_s, "")


@pytest.mark.parametrize("after_s", [-0.1, 86_401.0, 1e300, math.inf, math.nan])
def test_absences_that_cannot(after_s: float) -> None:
    with pytest.raises(InvalidMessage, match=r"the time until the client is to come back is .* s; allowed are 0 to 86400"):
        _heard(pb.AttendResponse(come_back=pb.ComeBack(after_s=after_s)))


@pytest.mark.parametrize(
    ("version", "told"),
    [
        (mb.ModelVersion(number=3, digest=bytes(31)), "the digest of version 3 has 31 bytes; a SHA-256 has 32"),
        (mb.ModelVersion(number=3, digest=bytes(33)), "the digest of version 3 has 33 bytes; a SHA-256 has 32"),
        (mb.ModelVersion(number=3), "the digest of version 3 has 0 bytes"),
        (mb.ModelVersion(number=3, digest=bytes(32), size_bytes=-1), "version 3 is announced with -1 bytes"),
    ],
)
def test_a_version_that_cannot_be_is_refused_wherever_it_is_named(version: mb.ModelVersion, told: str) -> None:
    plan = pb.Plan(kind=mb.ROUND_KIND_TRAINING, epochs=1, batch_size=1, learning_rate=0.1)
    for message in (
        pb.AttendResponse(welcome=pb.Welcome(heartbeat_s=1.0, version=version)),
        pb.AttendResponse(assignment=pb.Assignment(version=version, plan=plan)),
        pb.AttendResponse(new_version=pb.NewVersion(version=version)),
    ):
        with pytest.raises(InvalidMessage, match=told):
            _heard(message)


def test_a_coordinators_words_are_cut() -> None:
    endless = "x" * 10_000
    plan = pb.Plan(kind=mb.ROUND_KIND_TRAINING, task=endless, task_version=endless, epochs=1, batch_size=1, learning_rate=0.1)
    for message in (
        pb.AttendResponse(welcome=pb.Welcome(run=endless, heartbeat_s=1.0, version=VERSION, notice=endless)),
        pb.AttendResponse(assignment=pb.Assignment(id=endless, version=VERSION, plan=plan)),
        pb.AttendResponse(cancel=pb.Cancel(assignment=endless, reason=endless)),
        pb.AttendResponse(come_back=pb.ComeBack(reason=endless)),
    ):
        assert len(str(_heard(message))) < 3000
    assert len(wire.receipt_from_pb(pb.UploadResponse(verdict=pb.VERDICT_LATE, reason=endless)).reason) == wire.WORDS


# Chunks


@given(st.binary(max_size=100), st.integers(0, 2**40))
def test_a_piece_is_verified_at_its_offset(data: bytes, offset: int) -> None:
    for read, frame in ((wire.read_download, wire.download_frame), (wire.read_upload, wire.upload_frame)):
        piece = read(frame(data, offset))
        assert isinstance(piece, Piece)
        assert piece.offset == offset
        assert wire.verified(piece, offset, offset + len(data)) == data


def test_what_is_no_message_at_all_has_a_name() -> None:
    with pytest.raises(InvalidMessage, match="3 bytes that are no DownloadResponse"):
        wire.read_download(b"\xff\xff\xff")
    with pytest.raises(InvalidMessage, match="3 bytes that are no UploadRequest"):
        wire.read_upload(b"\xff\xff\xff")


def _chunk(offset: int, data: bytes) -> Piece:
    return taken(piece(data, offset))


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (_chunk(5, b"fghi"), "a chunk begins at byte 5 where byte 4 is next"),  # gap
        (_chunk(3, b"defg"), "a chunk begins at byte 3 where byte 4 is next"),  # overlap
        (_chunk(0, b"abcd"), "a chunk begins at byte 0 where byte 4 is next"),  # repeated
        (_chunk(4, b"efghijk"), "11 bytes arrived where 10 were announced"),  # too much
        (Piece(4, b"efgh", crc32c(b"efgH")), "the chunk at byte 4 does not match its CRC-32C"),
        (Piece(4, b"efgh", 0), "the chunk at byte 4 does not match its CRC-32C"),
    ],
)
def test_a_damaged_transfer_is_found(message: Piece, told: str) -> None:
    with pytest.raises(CorruptTransfer, match=f"{told}: send it again"):
        wire.verified(message, 4, 10)


@given(st.binary(min_size=1, max_size=64), st.data())
def test_any_flipped_bit_is_found(content: bytes, data: st.DataObject) -> None:
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorruptTransfer, match="CRC-32C"):
        wire.verified(Piece(0, bytes(damaged), crc32c(content)), 0, len(content))


def test_of_what_a_client_can_do_no_more_is_looked_at_than_there_is() -> None:
    current = wire.PROTOCOL_VERSION
    hello = pb.Hello(protocol_version=current, client="alice", codecs=["x" * 10_000, *map(str, range(1000))])
    said = wire.from_client_from_pb(pb.AttendRequest(hello=hello))
    assert isinstance(said, Hello)
    assert (len(said.codecs), len(said.codecs[0])) == (32, wire.WORDS)
