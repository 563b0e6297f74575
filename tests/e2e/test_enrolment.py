"""How devices come to belong, go on belonging, and stop: with real processes, as their owners would."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from choral.address import HostPort
from choral.durable import write_durably
from choral.errors import ChoralError, Deceived, TrustError
from choral.fingerprint import shown_fingerprint
from choral.identity import read_identity
from choral.secagg.keys import fresh
from choral.secagg.roster import Terms, advert, check_advert
from choral.status import reason_of
from choral.token import Token
from choral.v1 import admin_pb2
from choral.voucher import Voucher, check
from choral_client.enrolment import enrol, renew
from choral_client.guard_file import GuardFile
from choral_client.known_keys import KnownKeys
from choral_client.signing_key import SigningKey
from choral_server.trust import Authority, make_authority, make_voucher_authority
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from e2e.federation import Federation, run_apart, until
from e2e.scripted import Scripted, hello
from e2e.test_access import certificate


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A coordinator that waits for clients."""
    with Federation(tmp_path_factory.mktemp("idle")) as started:
        started.coordinator(exit_when_done=False)
        yield started


def tried(federation: Federation, token: str, state: Path) -> str:
    """The name under which somebody enrolled, or the error's."""
    try:
        return run_apart(enrol(Token.parse(token), HostPort.parse(federation.address), state)).name
    except ChoralError as error:
        return type(error).__name__


def test_a_token_turns_into_an_identity_whose_keys_are_the_devices_own(idle: Federation, tmp_path: Path) -> None:
    token = idle.command("server", "token", "alice", "--expires", "1h", "-c", idle.config).stdout.strip()
    enrolled = idle.start("enrol", "client", "enrol", token, "--server", idle.address, folder=tmp_path)
    assert enrolled.code() == 0, enrolled.stderr
    assert "Enrolled as device alice" in enrolled.stdout
    folder = tmp_path / "choral-alice" / "identity"
    assert {path.name for path in folder.iterdir()} == {
        "tls.key",
        "tls.pem",
        "signing.key",
        "signing.voucher",
        "ca.pem",
        "about.json",
    }
    for key in ("tls.key", "signing.key"):
        assert stat.S_IMODE((folder / key).stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert read_identity(folder).credentials.ca == idle.ca.read_bytes()
    signer = SigningKey.of(folder.parent).signer("alice")
    check(signer.voucher, "alice", signer.key, idle.ca.read_bytes(), datetime.now(UTC))
    [row] = [row for row in idle.rows("clients", "enrolled") if row["name"] == "alice"]
    assert (row["role"], row["reason"]) == ("device", "")
    secret = Token.parse(token).secret
    assert not any(secret in path.read_bytes() for path in (idle.folder / "state").rglob("*") if path.is_file())


def test_a_token_works_once(idle: Federation, tmp_path: Path) -> None:
    token = idle.token("once")
    assert tried(idle, token, tmp_path / "first") == "once"
    assert tried(idle, token, tmp_path / "second") == "TokenRefused"
    before = read_identity(tmp_path / "first" / "identity")
    with grpc.secure_channel(idle.address, grpc.ssl_channel_credentials(before.credentials.ca)):
        assert tried(idle, idle.token("other"), tmp_path / "third") == "other"  # who was refused has hurt nobody


def test_of_many_that_race_with_one_token_one_wins(idle: Federation, tmp_path: Path) -> None:
    token = idle.token("racer")
    with ThreadPoolExecutor(8) as racers:
        ended = list(racers.map(lambda number: tried(idle, token, tmp_path / str(number)), range(8)))
    assert sorted(ended) == ["TokenRefused"] * 7 + ["racer"]
    winner = tmp_path / str(ended.index("racer"))
    [row] = [row for row in idle.rows("clients", "enrolled") if row["name"] == "racer"]
    assert (winner / "identity").is_dir()
    assert row["key"]


def test_an_answer_that_was_lost_is_asked_for_again_with_the_same_keys(idle: Federation, tmp_path: Path) -> None:
    token = idle.token("patient")
    assert tried(idle, token, tmp_path) == "patient"
    first = (tmp_path / "identity" / "tls.key").read_bytes()
    # as if the process had ended before it had the answer: its keys are there, and no certificate
    (tmp_path / "identity").rename(tmp_path / "identity.new")
    for name in ("tls.pem", "ca.pem", "about.json"):
        (tmp_path / "identity.new" / name).unlink()
    assert tried(idle, token, tmp_path) == "patient"
    assert (tmp_path / "identity" / "tls.key").read_bytes() == first


def test_a_token_expires(idle: Federation, tmp_path: Path) -> None:
    token = idle.token("late", expires_s=0.001)
    assert tried(idle, token, tmp_path) == "TokenRefused"


def test_a_token_of_another_coordinator_gives_its_secret_to_nobody(idle: Federation, tmp_path: Path) -> None:
    make_authority(tmp_path / "other", ["localhost"])
    fingerprint = Authority.load(tmp_path / "other" / "ca.pem", tmp_path / "other" / "ca.key").fingerprint
    token = str(Token("alice", idle.enrolment_port, fingerprint))
    enrolled = idle.start("enrol", "client", "enrol", token, "--server", idle.address, "--state", tmp_path / "state")
    assert enrolled.code() == TrustError.exit_code
    assert "is not the one that made the token" in enrolled.stderr
    assert "enrolment refused" not in idle.processes[0].stderr.splitlines()[-1]  # it was not even asked


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("choral-", "--server", "localhost:1"), 6, "the enrolment token is damaged"),
        (("nonsense", "--server", "localhost:1"), 6, "this is no enrolment token"),
        (("@missing", "--server", "localhost:1"), 2, "missing cannot be read"),
    ],
)
def test_a_token_that_is_none(idle: Federation, arguments: tuple[str, ...], code: int, told: str) -> None:
    ended = idle.command("client", "enrol", *arguments)
    assert ended.code() == code
    assert told in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("al/ice",), 2, "name 'al/ice' is not allowed"),
        (("alice", "--expires", "soon"), 2, "'soon' is no duration"),
        (("alice", "--expires", "400d"), 2, "cannot expire after"),
        (("taken",), 8, "taken is enrolled already, as device: give --replace"),
    ],
)
def test_a_token_that_cannot_be_made(idle: Federation, arguments: tuple[str, ...], code: int, told: str) -> None:
    idle.identity("taken")
    ended = idle.command("server", "token", *arguments, "-c", idle.config)
    assert ended.code() == code
    assert told in ended.stderr


def test_who_enrols_anew_takes_the_place_of_the_old_device(idle: Federation, tmp_path: Path) -> None:
    idle.identity("twice")
    with Scripted(idle, hello("twice"), member="twice") as old:
        old.hear("welcome")
        assert tried(idle, idle.token("twice"), tmp_path) == "twice"
        with pytest.raises(grpc.RpcError) as ended:
            old.hear("assignment")
    assert reason_of(ended.value) == "Revoked"
    with Scripted(idle, hello("twice"), member="twice") as old, pytest.raises(grpc.RpcError) as refused:
        old.hear("welcome")
    assert (reason_of(refused.value), "with other keys" in refused.value.details()) == ("Unauthenticated", True)


def test_a_revocation_ends_what_is_open_and_voids_unused_tokens(idle: Federation, tmp_path: Path) -> None:
    idle.identity("thief")
    spare = idle.token("thief")
    with Scripted(idle, hello("thief")) as thief:
        thief.hear("welcome")
        revoked = idle.command("clients", "revoke", "thief", "--reason", "stolen", "-c", idle.config)
        assert revoked.stdout.strip() == "device thief: revoked (stolen)"
        with pytest.raises(grpc.RpcError) as ended:
            thief.hear("assignment")
    assert (reason_of(ended.value), ended.value.details()) == ("Revoked", "thief does not belong any more: stolen")
    assert tried(idle, spare, tmp_path / "spare") == "TokenRefused"
    again = idle.command("clients", "revoke", "thief", "-c", idle.config)
    assert (again.code(), "was revoked on" in again.stderr) == (8, True)
    unknown = idle.command("clients", "revoke", "nobody-here", "-c", idle.config)
    assert (unknown.code(), "'nobody-here' has not enrolled" in unknown.stderr) == (2, True)
    assert tried(idle, idle.token("thief"), tmp_path / "back") == "thief"  # it was found again


def test_a_revoked_client_ends_with_the_reason_and_the_others_train_on(quick: Federation) -> None:
    quick.coordinator(run={"rounds": 300, "quorum": 1, "start_with": 2, "schedule": {"interval_s": 0.05}})
    alice, bob = quick.client("alice"), quick.client("bob")
    quick.processes[0].saw("round done", 3)
    assert quick.command("clients", "revoke", "bob", "--reason", "sold", "-c", quick.config).code() == 0
    assert bob.code() == 8
    assert "bob does not belong any more: sold" in bob.stderr
    assert quick.processes[0].saw("client left", client="bob")["reason"].endswith("does not belong any more: sold")
    done = len(quick.processes[0].events("round done"))
    quick.processes[0].saw("round done", done + 3)  # also the round that it may have left in its middle
    assert "bob" not in quick.command("doctor", "-c", quick.config).stdout  # nobody waits for it
    assert quick.command("runs", "stop", "-c", quick.config).code() == 0
    assert alice.code() == 0


def test_certificates_are_renewed_before_they_expire_while_rounds_go_on(quick: Federation) -> None:
    settings = {"rounds": 10_000, "schedule": {"interval_s": 0.05}}
    coordinator = quick.coordinator(run=settings, enrolment={"certificate_s": 9})
    clients = [quick.client(name) for name in ("alice", "bob")]
    before = [quick.folder / client.name / "client" / "identity" / "tls.pem" for client in clients]
    for client in clients:
        client.saw("certificate renewed", 2)
    until(lambda: all(path.exists() for path in before))
    done = len(coordinator.events("round done"))
    coordinator.saw("round done", done + 5)
    assert not coordinator.events("round abandoned")
    assert quick.command("runs", "stop", "-c", quick.config).code() == 0
    assert [client.code() for client in clients] == [0, 0]


def test_a_device_from_before_there_were_vouchers_gets_one_when_it_renews_and_keeps_its_owners(
    idle: Federation, tmp_path: Path
) -> None:
    known = idle.identity("older")
    (known.folder / "signing.voucher").unlink()
    key = SigningKey.of(known.folder.parent)
    assert key.signer("older").voucher == b""
    run_apart(renew(known))
    check(key.signer("older").voucher, "older", key.public, idle.ca.read_bytes(), datetime.now(UTC))

    make_voucher_authority(tmp_path)
    elsewhere = Authority.load(tmp_path / "ca.pem", tmp_path / "ca.key").vouch("older", key.public)
    key.keep(Voucher("older", key.public, elsewhere))
    run_apart(renew(known))
    assert key.signer("older").voucher == elsewhere
    assert tried(idle, idle.token("older"), known.folder.parent) == "older"  # all keys of TLS are others, this one stays
    assert SigningKey.of(known.folder.parent).signer("older").voucher == elsewhere


def test_enrolled_devices_know_each_others_signing_keys_and_no_operators(idle: Federation) -> None:
    terms = Terms("run", 1, bytes(32), bytes(32))
    keys = {}
    for name, role in (("anna", "device"), ("ben", "device"), ("chief", "operator")):
        keys[name] = SigningKey.of(idle.identity(name, role).folder.parent)
    said = {name: advert(terms, name, fresh().shown(), key.signer(name)) for name, key in keys.items()}
    for name, other in (("anna", "ben"), ("ben", "anna")):
        folder = keys[name].state
        known = KnownKeys(name, keys[name].public, GuardFile(folder), read_identity(folder / "identity").credentials.ca)
        check_advert(terms, said[other], known.vouch)
        check_advert(terms, said[name], known.vouch)
        with pytest.raises(Deceived, match="nobody certifies the signing key of chief"):
            check_advert(terms, said["chief"], known.vouch)
        with pytest.raises(Deceived, match="somebody poses as mallory"):
            known.vouch(replace(said[other], client="mallory"))


def test_a_client_whose_certificate_has_expired_says_so(idle: Federation, tmp_path: Path) -> None:
    idle.identity("sleeper")
    state = tmp_path / "sleeper"
    shutil.copytree(idle.folder / "members" / "sleeper", state)
    key, expired = certificate(idle.folder, "sleeper", -60)
    write_durably(state / "identity" / "tls.key", key)
    write_durably(state / "identity" / "tls.pem", expired)
    ended = idle.client("sleeper", flags={"--state": state})
    assert ended.code() == TrustError.exit_code
    assert "has expired on" in ended.stderr
    assert "enrol again" in ended.stderr


def test_a_client_that_never_enrolled_says_so(idle: Federation, tmp_path: Path) -> None:
    arguments = ("--task", "small:task", "--data", idle.write_shard("fresh"), "--state", tmp_path / "fresh")
    ended = idle.start("fresh", "client", *arguments)
    assert ended.code() == TrustError.exit_code
    assert "this client has not enrolled" in ended.stderr


def test_an_operators_identity_does_not_take_part(idle: Federation) -> None:
    idle.identity("boss", "operator")
    flags = {"--state": idle.folder / "members" / "boss"}
    ended = idle.client("boss", flags=flags)
    assert (ended.code(), "holds the identity of a operator" in ended.stderr) == (2, True)


def test_certificates_of_an_authority_of_yours(quick: Federation, tmp_path: Path) -> None:
    """Bring your own: nothing is enrolled, and a revocation goes by the name."""
    make_authority(tmp_path, ["localhost"])
    roles = {"operators": ["carol"], "ca_key": None}
    tls = {"certificate": "server.pem", "key": "server.key", "ca": str(tmp_path / "ca.pem")} | roles
    quick.coordinator(tls=tls, run={"rounds": 100_000, "quorum": 1, "schedule": {"interval_s": 0.05}})
    files = {}
    for name in ("alice", "bob", "carol"):
        key, made = certificate(tmp_path, name)
        files[name] = {"--ca": quick.ca, "--certificate": tmp_path / f"{name}.pem", "--key": tmp_path / f"{name}.key"}
        files[name]["--certificate"].write_bytes(made)
        files[name]["--key"].write_bytes(key)
    alice, bob = (quick.client(name, flags=files[name]) for name in ("alice", "bob"))
    quick.processes[0].saw("round done", 3)
    key = SigningKey.of(quick.folder / "alice" / "client")  # made at the first start, and certified by nobody
    assert alice.saw("client starts")["signing_key"] == shown_fingerprint(key.public)
    assert key.signer("alice").voucher == b""
    carol = grpc.ssl_channel_credentials(
        quick.ca.read_bytes(), files["carol"]["--key"].read_bytes(), files["carol"]["--certificate"].read_bytes()
    )
    with grpc.secure_channel(quick.address, carol) as channel:
        method = "/choral.v1.Admin/RevokeMember"
        call = channel.unary_unary(
            method, admin_pb2.RevokeMemberRequest.SerializeToString, admin_pb2.RevokeMemberResponse.FromString
        )
        assert call(admin_pb2.RevokeMemberRequest(name="bob", reason="left")).member.name == "bob"
    assert bob.code() == 8
    assert "bob does not belong any more: left" in bob.stderr
    refused = quick.command("server", "token", "dave", "-c", quick.config)
    assert (refused.code(), "this coordinator enrols nobody" in refused.stderr) == (8, True)
    assert quick.command("runs", "stop", "-c", quick.config).code() == 0
    assert alice.code() == 0


def test_a_persons_certificate_is_renewed_when_it_is_used(idle: Federation) -> None:
    folder = idle.identity("carol", "operator").folder
    authority = Authority.load(idle.folder / "ca.pem", idle.folder / "ca.key")
    key = load_pem_private_key((folder / "tls.key").read_bytes(), None)
    earlier = datetime.now(UTC) - timedelta(minutes=50)
    old = authority.certify(key.public_key(), "carol", "operator", 3600.0, earlier).public_bytes(Encoding.PEM)
    write_durably(folder / "tls.pem", old)
    expires_at = read_identity(folder).credentials.expires_at
    listed = idle.command("runs", "list", "-c", folder.parent, "--json")
    assert listed.code() == 0, listed.stderr
    assert read_identity(folder).credentials.expires_at > expires_at + timedelta(days=30)
