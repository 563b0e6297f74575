"""Each limit: who goes beyond is refused by name, and the others train on."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator

import grpc
import pytest
from choral.address import HostPort
from choral.errors import LimitExceeded, Unreachable
from choral.status import from_rpc, reason_of
from choral.v1 import admin_pb2, enrolment_pb2, enrolment_pb2_grpc, federation_pb2, federation_pb2_grpc
from choral_client.enrolment import tls
from e2e.federation import PATIENCE_S, SMALL_TASK, Federation, until
from e2e.scripted import Scripted, delta, hello
from pieces import pieces

LIMITS = {
    "message_bytes": 65_536,
    "chunk_bytes": 262_144,
    "metadata_bytes": 2048,
    "connections": 24,
    "enrolment_connections": 4,
    "enrolments_per_s": 2,
    "handshake_s": 1,
    "idle_s": 1,
    "calls": 6,
    "calls_per_s": 20,
    "first_message_s": 0.5,
    "unread": 8,
}
BIG_TASK = SMALL_TASK.replace("nn.Linear(2, 1)", "nn.Sequential(nn.Linear(2, 300_000), nn.Linear(300_000, 1))").replace(
    "small", "big"
)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A coordinator with small limits, and two clients that train with it all the time."""
    with Federation(tmp_path_factory.mktemp("limits")) as started:
        run = {"rounds": 1_000_000, "schedule": {"interval_s": 0.2}, "stall_s": 1}
        started.coordinator(limits=LIMITS, run=run)
        for name in ("alice", "bob"):
            started.client(name)
        started.processes[0].saw("round done", 2)
        started.identity("mallory")
        yield started


@pytest.fixture(autouse=True)
def others_train_on(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each of these tests, further rounds are done by both clients."""
    yield
    if "federation" in request.fixturenames:
        coordinator = request.getfixturevalue("federation").processes[0]
        done = len(coordinator.events("round done", accepted=2))
        coordinator.saw("round done", done + 2, accepted=2)


def stub(channel: grpc.Channel) -> federation_pb2_grpc.FederationStub:
    return federation_pb2_grpc.FederationStub(channel)


def test_a_message_that_is_too_long(federation: Federation) -> None:
    with federation.secure_channel("mallory") as channel:
        long = federation_pb2.AttendRequest(hello=federation_pb2.Hello(client="mallory", software="x" * 70_000))
        with pytest.raises(grpc.RpcError) as refused:
            next(stub(channel).Attend(iter([long]), timeout=PATIENCE_S))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert isinstance(from_rpc(refused.value, "here"), LimitExceeded)
    assert "65536" in refused.value.details()


def test_metadata_that_is_too_long(federation: Federation) -> None:
    with federation.secure_channel("mallory") as channel, pytest.raises(grpc.RpcError) as refused:
        next(stub(channel).Attend(iter([hello("mallory")]), metadata=[("x-much", "m" * 3000)], timeout=PATIENCE_S))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert isinstance(from_rpc(refused.value, "here"), LimitExceeded)


def test_a_stream_that_says_nothing(federation: Federation) -> None:
    with Scripted(federation, member="mallory") as silent, pytest.raises(grpc.RpcError) as refused:
        silent.hear("welcome")
    assert reason_of(refused.value) == "LimitExceeded"
    assert "no hello came within 0.5 s (limits.first_message_s)" in refused.value.details()


def test_more_streams_than_one_client_may_have(federation: Federation) -> None:
    never = threading.Event()
    channels = [federation.secure_channel("mallory") for _ in range(2)]  # over as many connections as it likes
    open_ = [stub(channels[number % 2]).Upload.future(iter(_silence(never), None), timeout=PATIENCE_S) for number in range(12)]
    try:
        until(lambda: sum(call.done() for call in open_) >= 6)
        refused = [call.exception() for call in open_ if call.done()]
        told = {reason_of(error) for error in refused}
        assert "LimitExceeded" in told
        assert any("has 6 calls open: at most 6 (limits.calls)" in error.details() for error in refused)
    finally:
        never.set()
        for call in open_:
            call.cancel()
        for channel in channels:
            channel.close()


def _silence(never: threading.Event):  # type: ignore[no-untyped-def]
    return lambda: never.wait(PATIENCE_S) and None


def test_more_calls_in_a_second_than_one_client_may_begin(federation: Federation) -> None:
    with federation.secure_channel("mallory") as channel:
        ask = stub(channel).ResumeUpload
        told = set()
        for _ in range(600):
            with pytest.raises(grpc.RpcError) as refused:
                ask(federation_pb2.ResumeUploadRequest(), timeout=PATIENCE_S)
            told.add(reason_of(refused.value))
            if "LimitExceeded" in told:
                assert "mallory calls more than 20 times a second" in refused.value.details()
                break
    assert "LimitExceeded" in told
    until(lambda: "call refused" in {event["what"] for event in federation.rows("events", "--client", "mallory")})
    time.sleep(1)  # its account fills again, for the tests that follow


def test_silent_and_half_open_connections_are_closed(federation: Federation) -> None:
    for port in (HostPort.parse(federation.address).port, federation.enrolment_port):
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as silent:
            assert _ended(silent)
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as nonsense:
            nonsense.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert _ended(nonsense)


def test_an_idle_connection_of_a_stranger_is_closed(federation: Federation) -> None:
    """One that has done the handshake and asks for nothing."""
    context = ssl.create_default_context(cafile=str(federation.ca))
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", federation.enrolment_port), timeout=PATIENCE_S) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as idle,
    ):
        assert _ended(idle)


def test_a_connection_with_no_call_on_it_is_closed_also_a_members(federation: Federation) -> None:
    federation.identity("ex")
    with federation.admin() as admin:
        admin.RevokeMember(admin_pb2.RevokeMemberRequest(name="ex"))
    folder = federation.folder / "members" / "ex" / "identity"
    context = ssl.create_default_context(cafile=str(federation.ca))
    context.load_cert_chain(folder / "tls.pem", folder / "tls.key")
    context.set_alpn_protocols(["h2"])
    where = HostPort.parse(federation.address)
    with (
        socket.create_connection((where.host, where.port), timeout=PATIENCE_S) as plain,
        context.wrap_socket(plain, server_hostname=where.host) as idle,
    ):
        assert _ended(idle)


def test_refused_calls_are_counted_too(federation: Federation) -> None:
    federation.identity("ex-too")
    with federation.admin() as admin:
        admin.RevokeMember(admin_pb2.RevokeMemberRequest(name="ex-too"))
    with federation.secure_channel("ex-too") as channel:
        told = set()
        for _ in range(600):
            with pytest.raises(grpc.RpcError) as refused:
                stub(channel).ResumeUpload(federation_pb2.ResumeUploadRequest(), timeout=PATIENCE_S)
            told.add(reason_of(refused.value))
            if told == {"Revoked", "LimitExceeded"}:
                break
    assert told == {"Revoked", "LimitExceeded"}


def test_a_call_whose_one_request_never_comes(federation: Federation) -> None:
    never = threading.Event()
    with federation.secure_channel("mallory") as channel:
        call = channel.stream_unary("/choral.v1.Federation/ResumeUpload").future(iter(_silence(never), None), timeout=PATIENCE_S)
        error = call.exception()
        never.set()
    assert (reason_of(error), "no request came within 0.5 s (limits.first_message_s)" in error.details()) == ("LimitExceeded", True)


def _ended(link: socket.socket) -> bool:
    """Wait until the other side has closed it."""
    try:
        while link.recv(65_536):
            pass
    except ConnectionError:
        pass
    return True


@pytest.mark.parametrize("where", ["members", "enrolment"])
def test_more_connections_than_there_may_be(federation: Federation, where: str) -> None:
    port = HostPort.parse(federation.address).port if where == "members" else federation.enrolment_port
    links = [socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) for _ in range(60)]
    began = time.monotonic()
    gone_at_once = sum(_closed_already(link, began) for link in links)
    for link in links:
        link.close()
    assert gone_at_once >= 60 - (LIMITS["connections"] if where == "members" else LIMITS["enrolment_connections"])


def _closed_already(link: socket.socket, began: float) -> bool:
    """Whether it was closed before the time for a handshake was over, which a connection within the limit has."""
    link.settimeout(max(0.01, 0.9 - (time.monotonic() - began)))
    try:
        return link.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def test_more_attempts_to_enrol_than_are_looked_at(federation: Federation) -> None:
    credentials = grpc.ssl_channel_credentials(federation.ca.read_bytes())
    with grpc.secure_channel(f"127.0.0.1:{federation.enrolment_port}", credentials) as channel:
        enrol = enrolment_pb2_grpc.EnrolmentStub(channel).Enrol
        told = []
        for number in range(60):
            with pytest.raises(grpc.RpcError) as refused:
                enrol(enrolment_pb2.EnrolRequest(secret=number.to_bytes(24, "big")), timeout=PATIENCE_S)
            told.append(reason_of(refused.value))
    assert told[0] == "TokenRefused"
    assert told[-1] == "LimitExceeded"
    assert told.count("TokenRefused") < 40  # twenty at once, and two a second


def test_a_chunk_that_is_too_long(quick: Federation) -> None:
    quick.coordinator(limits={"chunk_bytes": 262_144}, run={"cohort_size": 1})
    with Scripted(quick, hello("alice")) as alice:
        assignment = alice.hear("assignment")
        chunks = pieces(bytes(262_145), 262_145)
        with pytest.raises(grpc.RpcError) as refused:
            alice.upload(alice.header(assignment.id), chunks)
        assert reason_of(refused.value) == "LimitExceeded"
        assert "a chunk of 262145 bytes: at most 262144 (limits.chunk_bytes)" in refused.value.details()
        assert alice.upload(alice.header(assignment.id)).verdict == federation_pb2.VERDICT_ACCEPTED


def test_an_upload_that_trickles_longer_than_a_round_may_last(quick: Federation) -> None:
    quick.coordinator(run={"cohort_size": 1, "deadline_s": 0.5, "extension_s": 0.1, "stall_s": 0.4}, exit_when_done=False)
    with Scripted(quick, hello("alice")) as alice:
        header = alice.header(alice.hear("assignment").id)

        def trickle() -> Iterator[federation_pb2.UploadRequest]:
            yield federation_pb2.UploadRequest(header=header)
            for chunk in pieces(delta(1, 2, 3), 1):
                time.sleep(0.2)  # what is tried out: each time just before it would stand still
                yield federation_pb2.UploadRequest(chunk=chunk)

        with pytest.raises(grpc.RpcError) as refused:
            alice.send(trickle())
    assert reason_of(refused.value) == "LimitExceeded"
    assert "longer than a round may: 1 s" in refused.value.details()


def test_a_download_that_nobody_reads(tmp_path_factory: pytest.TempPathFactory) -> None:
    with Federation(tmp_path_factory.mktemp("big")) as started:
        task = started.write_task(BIG_TASK, "big")
        started.coordinator(task=task, run={"stall_s": 0.5}, exit_when_done=False)
        options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536)]
        credentials = tls(started.identity("mallory").credentials)
        with grpc.secure_channel(started.address, credentials, options) as channel:
            call = stub(channel).Download(federation_pb2.DownloadRequest(version=0, client="mallory"), timeout=PATIENCE_S)
            next(call)
            started.processes[0].saw("download broken", client="mallory")
            with pytest.raises(grpc.RpcError) as broken:
                list(call)
        assert isinstance(from_rpc(broken.value, started.address), Unreachable)


def test_a_client_that_does_not_read_what_it_is_told(quick: Federation) -> None:
    quick.coordinator(limits={"unread": 8}, run={"rounds": 1_000_000, "quorum": 1, "start_with": 1, "cohort_size": 1})
    credentials = tls(quick.identity("deaf").credentials)
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 128)]
    with grpc.secure_channel(quick.address, credentials, options) as channel:
        said = threading.Event()
        call = stub(channel).Attend(_hello_then_nothing(said), timeout=PATIENCE_S)
        next(call)
        assert quick.command("clients", "quarantine", "deaf", "-c", quick.config).code() == 0  # no round waits for it
        quick.client("alice")
        left = quick.processes[0].saw("client left", client="deaf")
        assert left["reason"] == "it has left 8 messages unread (limits.unread)"
        with pytest.raises(grpc.RpcError) as ended:  # told so once it reads, and not left to wait
            list(call)
        assert reason_of(ended.value) == "LimitExceeded"
        said.set()
    done = len(quick.processes[0].events("round done"))
    quick.processes[0].saw("round done", done + 3)


def _hello_then_nothing(said: threading.Event) -> Iterator[federation_pb2.AttendRequest]:
    yield hello("deaf")
    said.wait(PATIENCE_S)
