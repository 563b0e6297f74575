"""Who may call what: every method of every service, by everyone who might try; and that each acts for itself."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from choral.status import reason_of
from choral.v1 import admin_pb2, admin_pb2_grpc, enrolment_pb2, federation_pb2, federation_pb2_grpc
from choral_server.access import ANYONE, NEEDS
from choral_server.trust import Authority, make_authority
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from e2e.federation import PATIENCE_S, Federation
from e2e.scripted import Scripted, hello
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

DESCRIBED = (federation_pb2, enrolment_pb2, admin_pb2, health_pb2, reflection_pb2)
METHODS = {
    f"/{service.full_name}/{method.name}": method
    for module in DESCRIBED
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
SHUT_OUT = {"Unauthenticated", "NotAllowed", "Revoked"}
ROLES = ("device", "operator", "viewer")


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A coordinator that waits for clients, with a member of each role, and one who was revoked."""
    with Federation(tmp_path_factory.mktemp("access")) as started:
        started.coordinator(exit_when_done=False)
        for role in ROLES:
            started.identity(f"a-{role}", role)
        for role in ROLES:
            started.identity(f"ex-{role}", role)
            with started.admin() as admin:
                admin.RevokeMember(admin_pb2.RevokeMemberRequest(name=f"ex-{role}", reason="the phone was stolen"))
        yield started


def channel(federation: Federation, key: bytes | None = None, certificate: bytes | None = None) -> grpc.Channel:
    """To the members' port, showing this certificate."""
    return grpc.secure_channel(federation.address, grpc.ssl_channel_credentials(federation.ca.read_bytes(), key, certificate))


def certificate(authority: Path, name: str, lifetime_s: float = 3600) -> tuple[bytes, bytes]:
    """A new key and a certificate for it from the authority in that folder, which nobody has enrolled."""
    key = ec.generate_private_key(ec.SECP256R1())
    signing = Authority.load(authority / "ca.pem", authority / "ca.key")
    made = signing.certify(key.public_key(), name, "device", lifetime_s, datetime.datetime.now(datetime.UTC))
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), made.public_bytes(Encoding.PEM)


def outcome(link: grpc.Channel, method: str) -> tuple[str, str]:
    """What an empty call ends with: the name of the error, or of gRPC's code, and what is said; "let in" if it is answered."""
    described = METHODS[method]
    kind = "_".join("stream" if streams else "unary" for streams in (described.client_streaming, described.server_streaming))
    call: Any = getattr(link, kind)(method)
    asked = iter([b""]) if described.client_streaming else b""
    try:
        answer = call(asked, timeout=PATIENCE_S)
        if described.server_streaming:
            next(answer, None)
            answer.cancel()
    except grpc.RpcError as error:
        return reason_of(error) or error.code().name, error.details()
    return "let in", ""


def test_the_table_has_every_method_that_there_is_and_no_other() -> None:
    assert set(NEEDS) - {"/grpc.health.v1.Health/List"} == set(METHODS) - {"/grpc.health.v1.Health/List"}  # gRPC 1.72 and later
    assert set(METHODS) <= set(NEEDS)


def test_the_services_that_are_served_are_the_ones_of_the_table(federation: Federation) -> None:
    with federation.secure_channel("a-viewer", "viewer") as link:
        ask = link.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        answer = next(ask(iter([asked]), timeout=PATIENCE_S))
    served = {service.name for service in answer.list_services_response.service}
    assert served == {method.split("/")[1] for method in NEEDS}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("method", sorted(set(METHODS) - {"/choral.v1.Admin/StopRun"}))
def test_each_role_gets_what_it_needs_and_nothing_else(federation: Federation, method: str, role: str) -> None:
    with federation.secure_channel(f"a-{role}", role) as link:
        reason, told = outcome(link, method)
    needed = {member.value for member in NEEDS[method]}
    if not needed or role in needed:
        assert reason not in SHUT_OUT, told
    else:
        assert reason == "NotAllowed"
        assert told == f"{method.rpartition('/')[2]} needs the role {' or '.join(sorted(needed))}; a-{role} is {role}"


def test_stopping_a_run_is_for_operators(federation: Federation) -> None:
    for role in ("device", "viewer"):
        with federation.secure_channel(f"a-{role}", role) as link:
            assert outcome(link, "/choral.v1.Admin/StopRun")[0] == "NotAllowed"
    with federation.secure_channel("a-operator", "operator") as link:
        assert outcome(link, "/choral.v1.Admin/StopRun")[0] == "let in"
        assert outcome(link, "/choral.v1.Admin/StartRun")[0] == "let in"
    assert federation.rows("events")[0]["by"] == "a-operator"


@pytest.mark.parametrize("method", sorted(METHODS))
def test_who_was_revoked_gets_nothing(federation: Federation, method: str) -> None:
    for role in ROLES:
        with federation.secure_channel(f"ex-{role}", role) as link:
            reason, told = outcome(link, method)
        if NEEDS[method] == ANYONE:
            assert reason == "TokenRefused"  # which everybody may be
        else:
            assert (reason, told) == ("Revoked", f"ex-{role} does not belong any more: the phone was stolen")


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("shown", ["nothing", "another authority's", "an expired one"])
def test_who_shows_no_good_certificate_gets_nothing(federation: Federation, tmp_path: Path, method: str, shown: str) -> None:
    key, made = None, None
    if shown == "another authority's":
        make_authority(tmp_path, ["localhost"])
        key, made = certificate(tmp_path, "a-device")
    if shown == "an expired one":
        key, made = certificate(federation.folder, "a-device", -60)
    with channel(federation, key, made) as link:
        assert outcome(link, method)[0] == "UNAVAILABLE"  # TLS ends the connection before a word is heard


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_certificate_that_nobody_enrolled_opens_nothing(federation: Federation, method: str) -> None:
    for name, told in (("stranger", "is not known here"), ("a-operator", "has enrolled anew, with other keys")):
        with channel(federation, *certificate(federation.folder, name)) as link:
            reason, said = outcome(link, method)
        if NEEDS[method] == ANYONE:
            assert reason == "TokenRefused"
        else:
            assert reason == "Unauthenticated"
            assert told in said


@pytest.mark.parametrize("method", sorted(METHODS))
def test_where_tokens_are_taken_nothing_else_is_served(federation: Federation, method: str) -> None:
    port = federation.enrolment_port
    with grpc.secure_channel(f"127.0.0.1:{port}", grpc.ssl_channel_credentials(federation.ca.read_bytes())) as link:
        reason, _ = outcome(link, method)
    expected = {"/choral.v1.Enrolment/Enrol": "TokenRefused", "/choral.v1.Enrolment/Renew": "Unauthenticated"}
    assert reason == expected.get(method, "UNIMPLEMENTED")


def test_a_device_attends_under_its_own_name_only(federation: Federation) -> None:
    with Scripted(federation, hello("bob"), member="a-device") as alice, pytest.raises(grpc.RpcError) as refused:
        alice.hear("welcome")
    assert reason_of(refused.value) == "NotAllowed"
    assert "the certificate of a-device, which cannot act as 'bob'" in refused.value.details()


def test_a_device_sends_and_asks_for_its_own_results_only(federation: Federation) -> None:
    header = federation_pb2.UploadHeader(assignment="run/0/bob/0", client="bob", digest=bytes(32), payload=1)
    with federation.secure_channel("a-device") as link:
        stub = federation_pb2_grpc.FederationStub(link)
        for call in (
            lambda: stub.Upload(iter([federation_pb2.UploadRequest(header=header)]), timeout=PATIENCE_S),
            lambda: stub.ResumeUpload(federation_pb2.ResumeUploadRequest(header=header), timeout=PATIENCE_S),
            lambda: next(stub.Download(federation_pb2.DownloadRequest(client="bob"), timeout=PATIENCE_S)),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                call()
            assert reason_of(refused.value) == "NotAllowed"


def test_operators_and_viewers_work_from_another_machine_with_their_identity(federation: Federation) -> None:
    for role in ("operator", "viewer"):
        federation.identity(f"a-{role}", role)
        listing = federation.command("runs", "list", "-c", federation.folder / "members" / f"a-{role}", "--json")
        assert listing.code() == 0, listing.stderr
    doctor = federation.command("doctor", "-c", federation.folder / "members" / "a-viewer")
    assert "clients" in doctor.stdout
    paused = federation.command("runs", "pause", "-c", federation.folder / "members" / "a-viewer")
    assert paused.code() == 8
    assert "PauseRun needs the role operator; a-viewer is viewer" in paused.stderr


def test_the_socket_is_the_operators_of_this_machine(federation: Federation) -> None:
    socket = federation.folder / "state" / "admin.sock"
    assert socket.parent.stat().st_mode & 0o077 == 0
    with federation.admin() as admin:
        assert isinstance(admin, admin_pb2_grpc.AdminStub)
        admin.PauseRun(admin_pb2.PauseRunRequest())
        admin.ResumeRun(admin_pb2.ResumeRunRequest())
    assert federation.rows("events")[0]["by"] != ""
