"""The contract as a raw peer meets it: what is served, who is let in, and what becomes of uploads that abuse it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from choral.v1 import admin_pb2, admin_pb2_grpc, model_pb2
from choral.v1 import federation_pb2 as pb
from e2e.federation import PATIENCE_S, Federation, Process
from e2e.scripted import MANIFEST, Scripted, delta, hello, refusal
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from pieces import pieces
from safetensors.numpy import load_file


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A coordinator that waits for more clients than there are, so that nothing happens by itself."""
    with Federation(tmp_path_factory.mktemp("f")) as federation:
        federation.coordinator(run={"rounds": 1, "cohort_size": 2, "start_with": 99})
        yield federation


def test_health_and_reflection_are_served_to_clients_and_the_operators_methods_are_not(idle: Federation) -> None:
    with idle.secure_channel() as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "choral.v1.Federation"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=PATIENCE_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        (listing,) = reflection.ServerReflectionInfo(iter([question]), timeout=PATIENCE_S)
        services = {service.name for service in listing.list_services_response.service}
        own = {"choral.v1.Federation", "choral.v1.Enrolment", "choral.v1.Admin"}
        assert services == own | {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
        with pytest.raises(grpc.RpcError) as refused:
            admin_pb2_grpc.AdminStub(channel).StopRun(admin_pb2.StopRunRequest(), timeout=PATIENCE_S)
        assert refusal(refused.value)[:2] == (grpc.StatusCode.PERMISSION_DENIED, "NotAllowed")


def test_nobody_is_served_without_tls(idle: Federation) -> None:
    with grpc.insecure_channel(idle.address) as channel, pytest.raises(grpc.RpcError) as refused:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("version", [0, 99])
def test_another_protocol_version_is_refused_with_both_versions(idle: Federation, version: int) -> None:
    with Scripted(idle, hello("alice", protocol_version=version)) as client, pytest.raises(grpc.RpcError) as refused:
        client.hear("welcome")
    code, reason, words = refusal(refused.value)
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ProtocolMismatch")
    spoken = f"the client speaks version {version} of the protocol, this coordinator version 2"
    assert words == f"{spoken}: install the same release of Choral on both"


BIAS_OF_TWO = model_pb2.Manifest(
    entries=[MANIFEST.entries[0], model_pb2.ManifestEntry(name="bias", dtype="F32", shape=[2], offset=2, kind=1)]
)
UNKNOWN_KIND = model_pb2.Manifest(entries=[model_pb2.ManifestEntry(name="weight", dtype="F32", shape=[1, 2], kind=7)])


@pytest.mark.parametrize(
    ("changes", "code", "reason", "words"),
    [
        ({"task": "other"}, "FAILED_PRECONDITION", "TaskMismatch", "this coordinator trains task small; client alice has other"),
        (
            {"task_version": "2"},
            "FAILED_PRECONDITION",
            "TaskMismatch",
            "trains version 1 of task small; client alice has version 2",
        ),
        (
            {"manifest": BIAS_OF_TWO},
            "FAILED_PRECONDITION",
            "ManifestMismatch",
            "entry 1 is bias F32 [2] (averaged) where bias F32 [1] (averaged) is expected",
        ),
        ({"manifest": None}, "FAILED_PRECONDITION", "ManifestMismatch", "entry 0 is missing where weight F32 [1, 2] (averaged)"),
        ({"manifest": UNKNOWN_KIND}, "INVALID_ARGUMENT", "InvalidMessage", "entry kind 7 is unknown to this release"),
        ({"client": "../alice"}, "PERMISSION_DENIED", "NotAllowed", "of somebody, which cannot act as '../alice'"),
        ({"client": "a" * 65}, "PERMISSION_DENIED", "NotAllowed", "of somebody, which cannot act as 'aaaa"),
        ({"client": ""}, "PERMISSION_DENIED", "NotAllowed", "of somebody, which cannot act as ''"),
    ],
)
def test_who_cannot_take_part_is_refused_at_once(idle: Federation, changes: dict, code: str, reason: str, words: str) -> None:
    with Scripted(idle, hello("alice", **changes)) as client, pytest.raises(grpc.RpcError) as refused:
        client.hear("welcome")
    assert refusal(refused.value)[:2] == (grpc.StatusCode[code], reason)
    assert words in refused.value.details()


def test_a_second_client_of_a_name_is_refused_and_the_same_start_takes_over(idle: Federation) -> None:
    with Scripted(idle, hello("nora")) as first:
        assert first.hear("welcome").run == "run"
        with Scripted(idle, hello("nora", instance="another start")) as second, pytest.raises(grpc.RpcError) as refused:
            second.hear("welcome")
        assert refusal(refused.value)[:2] == (grpc.StatusCode.ALREADY_EXISTS, "NameTaken")
        assert "a client named nora attends already, from ipv4:127.0.0.1:" in refused.value.details()
        with Scripted(idle, hello("nora")) as again:
            assert again.hear("welcome").run == "run"
            with pytest.raises(AssertionError, match="the stream ended"):
                first.hear("assignment")


@pytest.mark.parametrize("first", [pb.AttendRequest(heartbeat=pb.Heartbeat()), pb.AttendRequest()])
def test_an_attendance_begins_with_a_hello(idle: Federation, first: pb.AttendRequest) -> None:
    with Scripted(idle, first) as client, pytest.raises(grpc.RpcError) as refused:
        client.hear("welcome")
    assert refusal(refused.value)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "InvalidMessage")


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (hello("olga"), "a second hello on one stream"),
        (pb.AttendRequest(), "an attendance message that says nothing known to this release: update Choral on this side"),
        (pb.AttendRequest(status=pb.Status(phase=9)), "phase 9 is unknown to this release: update Choral on this side"),
    ],
)
def test_a_message_that_breaks_the_contract_ends_the_stream(idle: Federation, message: pb.AttendRequest, words: str) -> None:
    with Scripted(idle, hello("olga")) as client:
        client.hear("welcome")
        client.say(message)
        with pytest.raises(grpc.RpcError) as refused:
            client.hear("assignment")
    assert refusal(refused.value) == (grpc.StatusCode.INVALID_ARGUMENT, "InvalidMessage", words)


def test_a_message_longer_than_any_good_one_is_not_taken(idle: Federation) -> None:
    endless = hello("pia", task="x" * (5 << 20))
    with Scripted(idle, endless) as client, pytest.raises(grpc.RpcError) as refused:
        client.hear("welcome")
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_download_resumes_at_an_offset(idle: Federation) -> None:
    with Scripted(idle, hello("paul")) as client:
        version = client.hear("welcome").version
        whole = b"".join(response.chunk.data for response in client.download(version.number))
        assert len(whole) == version.size_bytes
        rest = list(client.download(version.number, 100))
        assert rest[0].chunk.offset == 100
        assert b"".join(response.chunk.data for response in rest) == whole[100:]
        assert list(client.download(version.number, len(whole))) == []
        for offset in (-1, len(whole) + 1):
            with pytest.raises(grpc.RpcError) as refused:
                list(client.download(version.number, offset))
            assert refusal(refused.value)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "InvalidMessage")
        for number in (1, -1, 2**62):
            with pytest.raises(grpc.RpcError) as refused:
                list(client.download(number))
            assert refusal(refused.value)[:2] == (grpc.StatusCode.NOT_FOUND, "UnknownVersion")


def test_a_client_that_falls_silent_is_sent_off(federation: Federation) -> None:
    coordinator = federation.coordinator(heartbeat_s=0.1, limits={"first_message_s": 0.5})
    with Scripted(federation, hello("alice")) as client:
        assert client.hear("welcome").heartbeat_s == pytest.approx(0.1)
        with pytest.raises(grpc.RpcError) as refused:
            client.hear("assignment")
        assert refusal(refused.value)[:2] == (grpc.StatusCode.UNAVAILABLE, "Unreachable")  # it may come back
        assert refused.value.details().startswith("nothing heard for 0.3 s")
    coordinator.saw("client left", client="alice", reason=refused.value.details())
    with Scripted(federation) as mute, pytest.raises(grpc.RpcError) as refused:
        mute.hear("welcome")
    assert refusal(refused.value)[2] == "no hello came within 0.5 s (limits.first_message_s)"


# Uploads. Each test has a round of alice and bob of its own; whatever alice does, bob's good result closes it.


class Pair:
    """Alice and bob in one round of a coordinator that asks nobody but them."""

    def __init__(self, federation: Federation, coordinator: Process, alice: Scripted, bob: Scripted) -> None:
        self.federation, self.coordinator, self.alice, self.bob = federation, coordinator, alice, bob
        asked = bob.hear("assignment")
        self.round, self.bobs, self.name = asked.round, asked.id, alice.hear("assignment").id

    def bob_is_accepted(self) -> None:
        assert self.bob.upload(self.bob.header(self.bobs)).verdict == pb.VERDICT_ACCEPTED

    def closes(self, alice: str, accepted: int, reason: str = "") -> None:
        """The round is done with bob's result, and alice's part stands as given."""
        self.bob_is_accepted()
        self.coordinator.saw("round done", round=self.round, accepted=accepted)
        with self.federation.admin() as admin:
            found = admin.ListRounds(admin_pb2.ListRoundsRequest(limit=1), timeout=PATIENCE_S).rounds[0]
        parts = {part.client: part for part in found.parts}
        assert (parts["alice"].state, parts["bob"].state) == (alice, "accepted")
        assert reason in parts["alice"].reason
        assert list((self.federation.folder / "state" / "spool").iterdir()) == []


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Federation, Process]]:
    """A coordinator that has done the round that is due at the start, and opens each further one when it is triggered."""
    with Federation(tmp_path_factory.mktemp("f")) as federation:
        run = {"rounds": 1000, "cohort_size": 2, "quorum": 1, "schedule": {"interval_s": 3600}, "quarantine_after": None}
        coordinator = federation.coordinator(run=run, evaluation={"clients": False})
        with Scripted(federation, hello("first")) as client:
            client.upload(client.header(client.hear("assignment").id))
        coordinator.saw("round done", round=0)
        yield federation, coordinator


@pytest.fixture
def pair(busy: tuple[Federation, Process]) -> Iterator[Pair]:
    federation, coordinator = busy
    with Scripted(federation, hello("alice")) as alice, Scripted(federation, hello("bob")) as bob:
        alice.hear("welcome")
        bob.hear("welcome")
        with federation.admin() as admin:
            admin.TriggerRound(admin_pb2.TriggerRoundRequest(), timeout=PATIENCE_S)
        yield Pair(federation, coordinator, alice, bob)
    for name in ("alice", "bob"):  # the next test's clients of these names are others
        coordinator.saw("client left", len(coordinator.events("client attends", client=name)), client=name)


CORRUPT = {
    "a checksum that does not match": ([model_pb2.Chunk(offset=0, data=delta(1, 2, 3), crc32=1)], 1),
    "a gap between chunks": ([*pieces(delta(1)), *[model_pb2.Chunk(offset=8, data=delta(3), crc32=pieces(delta(3))[0].crc32)]], 2),
    "less than was announced": (pieces(delta(1, 2)), 1),
    "more than was announced": (pieces(delta(1, 2, 3, 4)), 1),
    "a trailer that counts another number of chunks": (pieces(delta(1, 2, 3)), 2),
}


@pytest.mark.parametrize("damage", CORRUPT)
def test_a_damaged_upload_can_be_sent_again(pair: Pair, damage: str) -> None:
    chunks, count = CORRUPT[damage]
    header = pair.alice.header(pair.name)
    with pytest.raises(grpc.RpcError) as broken:
        pair.alice.upload(header, chunks, count)
    code, reason, words = refusal(broken.value)
    assert (code, reason) == (grpc.StatusCode.DATA_LOSS, "CorruptTransfer")
    assert words.endswith((": send it again", ": send the rest"))
    assert pair.alice.upload(header).verdict == pb.VERDICT_ACCEPTED
    pair.closes("accepted", 2)


def test_a_result_that_arrives_damaged_again_and_again_is_refused(pair: Pair) -> None:
    header, bad = pair.alice.header(pair.name), [model_pb2.Chunk(offset=0, data=delta(1, 2, 3), crc32=1)]
    for attempt in range(1, 5):
        with pytest.raises(grpc.RpcError):
            pair.alice.upload(header, bad)
        pair.coordinator.saw("upload corrupt", client="alice", assignment=pair.name, attempt=attempt)
    receipt = pair.alice.upload(header, bad)
    assert receipt.verdict == pb.VERDICT_REFUSED
    assert receipt.reason.startswith("the result of alice arrived damaged 5 times, the last time because ")
    pair.closes("refused", 1, "arrived damaged 5 times")


def test_an_upload_without_its_trailer_can_be_sent_again(pair: Pair) -> None:
    header = pb.UploadRequest(header=pair.alice.header(pair.name))
    for rest in ([], [pb.UploadRequest(chunk=chunk) for chunk in pieces(delta(1, 2, 3))]):
        with pytest.raises(grpc.RpcError) as broken:
            pair.alice.send([header, *rest])
        assert refusal(broken.value)[:2] == (grpc.StatusCode.UNAVAILABLE, "Unreachable")
    assert pair.alice.upload(header.header).verdict == pb.VERDICT_ACCEPTED
    pair.closes("accepted", 2)


def test_an_upload_is_a_header_chunks_and_a_trailer(pair: Pair) -> None:
    header = pb.UploadRequest(header=pair.alice.header(pair.name))
    unknown = pb.UploadRequest(header=pair.alice.header(pair.name, payload=9))
    for messages in ([], [pb.UploadRequest(trailer=pb.UploadTrailer())], [header, header], [header, pb.UploadRequest()], [unknown]):
        with pytest.raises(grpc.RpcError) as refused:
            pair.alice.send(messages)
        assert refusal(refused.value)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "InvalidMessage")
    assert pair.alice.upload(header.header).verdict == pb.VERDICT_ACCEPTED
    pair.closes("accepted", 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"payload_bytes": 16}, "alice announces 16 bytes; the model's result has 12"),
        ({"payload_bytes": -1}, "alice announces -1 bytes; the model's result has 12"),
        ({"payload_bytes": 2**62}, f"alice announces {2**62} bytes; the model's result has 12"),
        ({"payload": pb.PAYLOAD_KIND_STATISTICS}, "alice sends a statistics result; a training result was asked for"),
        ({"examples": 0}, "alice claims 0 examples; 1 to 1099511627776 are allowed"),
        ({"examples": 2**62}, f"alice claims {2**62} examples; 1 to 1099511627776 are allowed"),
        (
            {"held_out": [model_pb2.Metric(name="loss", value=1, examples=0)]},
            "alice measured loss on 0 examples; 1 to 1099511627776 are allowed",
        ),
        (
            {"held_out": [model_pb2.Metric(name="loss", value=float("nan"), examples=1)]},
            "alice measured loss = nan; at most 1e+30 is allowed",
        ),
        (
            {"held_out": [model_pb2.Metric(name="lost", value=1, examples=1)]},
            "alice measured 'lost', which was not asked for, or twice; the task has loss, mae",
        ),
    ],
)
def test_a_header_that_cannot_count_is_refused_and_the_round_goes_on(pair: Pair, changes: dict, words: str) -> None:
    receipt = pair.alice.upload(pair.alice.header(pair.name, **changes))
    assert (receipt.verdict, receipt.reason) == (pb.VERDICT_REFUSED, words)
    pair.closes("refused", 1, words)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((1, float("nan"), 3), "the update of alice holds an infinite or undefined number"),
        ((float("-inf"), 2, 3), "the update of alice holds an infinite or undefined number"),
        ((1, 2, -40000), "the update of alice holds 40000, over the bound of 32768"),
    ],
)
def test_a_payload_that_cannot_count_is_refused_and_the_round_goes_on(pair: Pair, values: tuple[float, ...], words: str) -> None:
    receipt = pair.alice.upload(pair.alice.header(pair.name), pieces(delta(*values)))
    assert receipt.verdict == pb.VERDICT_REFUSED
    assert receipt.reason == f"{words}: lower the learning rate, or look at its data"
    again = pair.alice.upload(pair.alice.header(pair.name))
    assert (again.verdict, again.reason) == (pb.VERDICT_REFUSED, f"this part was refused: {receipt.reason}")
    pair.closes("refused", 1, words)


def test_a_result_counts_for_whom_it_was_asked_only(pair: Pair) -> None:
    stolen = pair.bob.upload(pair.bob.header(pair.name, client="bob"))
    assert (stolen.verdict, stolen.reason) == (pb.VERDICT_REFUSED, f"assignment {pair.name} was given to alice, not to bob")
    names = (pair.name[:-1], "run/9999/alice/0", "", "../../etc", "run-2/0/alice/0")
    for name in names:
        unknown = pair.alice.upload(pair.alice.header(name, client="alice"))
        assert unknown.verdict == pb.VERDICT_REFUSED
        assert unknown.reason.startswith(f"assignment {name} is unknown: ")
        pair.coordinator.saw("upload refused", client="alice", assignment=name, reason=unknown.reason)
    first = f"assignment {names[0]} is unknown: nobody named alice was asked for it"
    events = [row["told"] for row in pair.federation.rows("events", "--client", "alice", "--limit", 1000)]
    assert [told for told in events if " is unknown: " in told] == [first]  # or whoever makes up names could fill the disk
    assert pair.alice.upload(pair.alice.header(pair.name)).verdict == pb.VERDICT_ACCEPTED
    pair.closes("accepted", 2)


def test_a_client_cannot_decline_for_another(pair: Pair) -> None:
    changes = pair.federation.watch()
    next(changes)
    for assignment, phase in ((pair.bobs, pb.PHASE_DECLINED), (pair.name, pb.PHASE_WORKING)):
        pair.alice.say(pb.AttendRequest(status=pb.Status(assignment=assignment, phase=phase)))
    states = ({part.client: part.state for part in change.round.parts} for change in changes if change.HasField("round"))
    assert next(state for state in states if state["alice"] == "working") == {"alice": "working", "bob": "announced"}
    changes.close()
    assert pair.alice.upload(pair.alice.header(pair.name)).verdict == pb.VERDICT_ACCEPTED
    pair.closes("accepted", 2)


def test_a_result_sent_twice_counts_once(pair: Pair) -> None:
    header = pair.alice.header(pair.name)
    before = load_file(pair.federation.versions / "latest.safetensors")
    assert pair.alice.upload(header).verdict == pb.VERDICT_ACCEPTED
    for _ in range(2):
        again = pair.alice.upload(header)
        assert (again.verdict, again.reason) == (pb.VERDICT_DUPLICATE, "this result was accepted before and counts once")
    pair.closes("accepted", 2)
    assert pair.alice.upload(header).verdict == pb.VERDICT_DUPLICATE  # also when the round has closed
    after = load_file(pair.federation.versions / "latest.safetensors")
    np.testing.assert_allclose(after["weight"] - before["weight"], [[1, 2]], rtol=1e-5)
    np.testing.assert_allclose(after["bias"] - before["bias"], [3], rtol=1e-5)


def test_two_uploads_of_a_result_at_the_same_time_count_once(pair: Pair) -> None:
    header = pair.alice.header(pair.name)
    says: queue.SimpleQueue[pb.UploadRequest | None] = queue.SimpleQueue()
    begun = threading.Event()

    def slow() -> Iterator[pb.UploadRequest]:
        yield pb.UploadRequest(header=header)
        begun.set()  # gRPC asks for the next message once the first is on its way
        yield from iter(says.get, None)

    call = pair.alice.stub.Upload.future(slow(), timeout=PATIENCE_S)
    assert begun.wait(PATIENCE_S)
    assert pair.alice.upload(header).verdict == pb.VERDICT_ACCEPTED
    says.put(pb.UploadRequest(chunk=pieces(delta(1, 2, 3))[0]))
    says.put(pb.UploadRequest(trailer=pb.UploadTrailer(chunks=1)))
    says.put(None)
    try:
        receipt = call.result()
    except grpc.RpcError as superseded:  # if the slow one had begun before the other did
        told = refusal(superseded)[1:]
        assert told == ("Unreachable", "another attempt to send this result took over")
        receipt = pair.alice.stub.ResumeUpload(pb.ResumeUploadRequest(header=header), timeout=PATIENCE_S).receipt
    assert receipt.verdict == pb.VERDICT_DUPLICATE
    pair.closes("accepted", 2)


def test_a_broken_upload_goes_on_where_it_broke(pair: Pair) -> None:
    header = pair.alice.header(pair.name)
    ask = pb.ResumeUploadRequest(header=header)
    assert pair.alice.stub.ResumeUpload(ask, timeout=PATIENCE_S).offset == 0
    first, second = pieces(delta(1, 2, 3), size=8)
    with pytest.raises(grpc.RpcError):
        pair.alice.send([pb.UploadRequest(header=header), pb.UploadRequest(chunk=first)])
    assert pair.alice.stub.ResumeUpload(ask, timeout=PATIENCE_S).offset == 8
    header.offset = 8
    end = pb.UploadRequest(trailer=pb.UploadTrailer(chunks=1))
    receipt = pair.alice.send([pb.UploadRequest(header=header), pb.UploadRequest(chunk=second), end])
    assert receipt.verdict == pb.VERDICT_ACCEPTED
    assert pair.alice.stub.ResumeUpload(ask, timeout=PATIENCE_S).receipt.verdict == pb.VERDICT_DUPLICATE
    pair.closes("accepted", 2)


def test_other_bytes_than_the_digest_says_are_not_taken(pair: Pair) -> None:
    header = pair.alice.header(pair.name)
    swapped = [pb.UploadRequest(chunk=chunk) for chunk in pieces(delta(3, 2, 1))]
    with pytest.raises(grpc.RpcError) as corrupt:
        pair.alice.send([pb.UploadRequest(header=header), *swapped, pb.UploadRequest(trailer=pb.UploadTrailer(chunks=1))])
    assert refusal(corrupt.value)[1] == "CorruptTransfer"
    assert pair.alice.upload(header).verdict == pb.VERDICT_ACCEPTED
    pair.closes("accepted", 2)


def test_a_result_that_comes_after_the_round_has_closed_is_late(federation: Federation) -> None:
    run = {"rounds": 1, "cohort_size": 1, "over_selection": 1.0, "start_with": 2}
    coordinator = federation.coordinator(run=run, evaluation={"clients": False}, exit_when_done=False)
    with Scripted(federation, hello("alice")) as alice, Scripted(federation, hello("bob")) as bob:
        part = alice.hear("assignment").id
        assert bob.upload(bob.header(bob.hear("assignment").id)).verdict == pb.VERDICT_ACCEPTED
        cancel = alice.hear("cancel")
        assert (cancel.assignment, cancel.reason) == (part, "round 0 closed: the goal was reached")
        late = alice.upload(alice.header(part))
        assert (late.verdict, late.reason) == (pb.VERDICT_LATE, "this part was cancelled: round 0 closed: the goal was reached")
        version = alice.hear("new_version").version
        assert version.number == 1
        coordinator.saw("run over", reason="1 rounds completed")
        coordinator.terminate()
        for client in (alice, bob):
            farewell = client.hear("come_back")
            assert farewell.after_s > 0  # it may be started again, with another run
            assert farewell.reason == "the coordinator restarts"
    assert coordinator.code() == 0


@pytest.mark.parametrize(
    ("vector", "words"),
    [
        ([10, 0, 0, 1, -1], "alice sends statistics with a negative sum of squares"),
        ([0, 0, 0, 1, 1], "alice sends statistics that are not finite, or of 0.0 examples; at least one is needed"),
        ([10, np.nan, 0, 1, 1], "alice sends statistics that are not finite, or of 10.0 examples; at least one is needed"),
        ([2.0**41, 0, 0, 1, 1], "alice sends statistics of 2.19902e+12 examples and 2 features"),
    ],
)
def test_statistics_that_cannot_count_are_refused(standardised: Federation, vector: list[float], words: str) -> None:
    with Scripted(standardised, hello("alice", manifest=STANDARDISED)) as alice:
        assignment = alice.hear("assignment").id
        payload = np.array(vector, dtype="<f8").tobytes()
        header = alice.header(assignment, payload=pb.PAYLOAD_KIND_STATISTICS, payload_bytes=len(payload))
        receipt = alice.upload(header, pieces(payload))
    assert (receipt.verdict, receipt.reason) == (pb.VERDICT_REFUSED, words)


STANDARDISED = model_pb2.Manifest(
    entries=[
        model_pb2.ManifestEntry(name="0.mean", dtype="F32", shape=[2], kind=model_pb2.ENTRY_KIND_STATISTIC),
        model_pb2.ManifestEntry(name="0.scale", dtype="F32", shape=[2], kind=model_pb2.ENTRY_KIND_STATISTIC),
        model_pb2.ManifestEntry(name="1.weight", dtype="F32", shape=[1, 2], offset=0, kind=model_pb2.ENTRY_KIND_AVERAGED),
        model_pb2.ManifestEntry(name="1.bias", dtype="F32", shape=[1], offset=2, kind=model_pb2.ENTRY_KIND_AVERAGED),
    ]
)


@pytest.fixture(scope="module")
def standardised(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A coordinator that needs alice's statistics, and asks for them as long as she sends none that count."""
    task = "from dataclasses import replace\nfrom choral import Standardize\nfrom torch import nn\nimport small\n\n"
    task += "task = replace(small.task, model=lambda: nn.Sequential(Standardize(2), nn.Linear(2, 1)))\n"
    with Federation(tmp_path_factory.mktemp("f")) as federation:
        run = {"rounds": 1, "cohort_size": 1, "retry_s": 0, "max_abandoned": 1000, "quarantine_after": None}
        federation.coordinator(task=federation.write_task(task, "standardised"), run=run)
        yield federation


def test_the_order_of_arrival_changes_no_bit(tmp_path_factory: pytest.TempPathFactory) -> None:
    sent = {"alice": (10, [0.1, 0.2, 0.3]), "bob": (20, [0.7, -1 / 3, 0]), "carol": (33, [1e-7, 1e4, -0.3])}
    after = []
    for order in (["alice", "bob", "carol"], ["carol", "alice", "bob"]):
        with Federation(tmp_path_factory.mktemp("f")) as federation:
            federation.coordinator(run={"rounds": 1, "cohort_size": 3}, evaluation={"clients": False}, exit_when_done=False)
            clients = {name: Scripted(federation, hello(name)) for name in sent}
            for name in order:
                assignment = clients[name].hear("assignment").id
                examples, values = sent[name]
                header = clients[name].header(assignment, examples=examples)
                assert clients[name].upload(header, pieces(delta(*values))).verdict == pb.VERDICT_ACCEPTED
            clients[name].hear("new_version")
            for client in clients.values():
                client.leave()
            before, latest = (load_file(federation.versions / f"{name}.safetensors") for name in ("000000", "latest"))
        after.append(latest)
    assert {name: tensor.tobytes() for name, tensor in after[0].items()} == {
        name: tensor.tobytes() for name, tensor in after[1].items()
    }
    # (10·0.1 + 20·0.7 + 33·1e-7) / 63, (10·0.2 − 20/3 + 33·1e4) / 63, (10·0.3 − 33·0.3) / 63
    np.testing.assert_allclose(after[0]["weight"] - before["weight"], [[0.23809529, 5238.0212]], rtol=1e-5)
    np.testing.assert_allclose(after[0]["bias"] - before["bias"], [-0.10952381], rtol=1e-5)
