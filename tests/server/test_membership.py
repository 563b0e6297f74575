from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from choral.errors import ConfigError, InvalidMessage, NotAllowed, Revoked, TokenRefused, Unauthenticated, WrongState
from choral.token import PROOF, Token
from choral.voucher import check
from choral_server.caller import Caller, Role
from choral_server.membership import Membership, Roles
from choral_server.records import MemberRecord
from choral_server.trust import Authority, make_authority
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from server.home import NOON, Home, home

__all__ = ["home"]

HOUR = timedelta(hours=1)


class Clock:
    """Says what a test wants."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> datetime:
        return self.now


class Device:
    """The keys of one who enrols."""

    def __init__(self) -> None:
        self.key: Any = ec.generate_private_key(ec.SECP256R1())
        self.signing = ed25519.Ed25519PrivateKey.generate()

    def request(self) -> bytes:
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "whatever")])
        return (
            x509.CertificateSigningRequestBuilder().subject_name(subject).sign(self.key, hashes.SHA256()).public_bytes(Encoding.DER)
        )

    def asks(self, token: Token) -> tuple[bytes, bytes, bytes, bytes]:
        request = self.request()
        return token.secret, request, self.signing.public_key().public_bytes_raw(), self.signing.sign(PROOF + request)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def membership(home: Home, clock: Clock, tmp_path: Path) -> Membership:
    if not (tmp_path / "ca.pem").exists():
        make_authority(tmp_path, ["localhost"])
    authority = Authority.load(tmp_path / "ca.pem", tmp_path / "ca.key")
    made = Membership(home.store, authority, 3600.0, clock)
    made.enrolment_port = 8471
    return made


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


async def enrolled(membership: Membership, name: str = "alice", role: Role = Role.DEVICE) -> tuple[Device, bytes]:
    """A device that has enrolled, and its certificate."""
    token, _ = await membership.issue(name, role, 0, replacing=True)
    device = Device()
    certificate, _ = await membership.enrol(*device.asks(token))
    return device, pem(certificate)


@pytest.mark.parametrize("role", list(Role))
async def test_who_enrols_is_known_by_the_tokens_name_and_role(membership: Membership, role: Role) -> None:
    device, certificate = await enrolled(membership, "alice", role)
    caller = membership.identify(certificate)
    assert (caller.name, caller.role, caller.certified, caller.expires_at) == ("alice", role, True, NOON + HOUR)
    read = x509.load_pem_x509_certificate(certificate)
    assert read.public_key() == device.key.public_key()
    assert read.subject.rfc4514_string() == f"OU={role.value},CN=alice"  # not what the request says


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (bytes.fromhex("2a8648ce3d030107"), bytes.fromhex("2a8648ce3d030163")),  # a curve that nobody knows
        (bytes.fromhex("2a8648ce3d0201"), bytes.fromhex("2a8648ce3d0263")),  # a kind of key
        (bytes.fromhex("020100"), bytes.fromhex("020107")),  # a version of requests,
        (bytes.fromhex("020102"), bytes.fromhex("020107")),  # and of certificates
        (bytes.fromhex("0c05616c696365"), bytes.fromhex("0305616c696365")),  # a name of bits
    ],
)
async def test_what_no_release_can_read_is_refused_by_name(membership: Membership, old: bytes, new: bytes) -> None:
    device, shown = await enrolled(membership)
    der = x509.load_pem_x509_certificate(shown).public_bytes(Encoding.DER)
    if old in der and not (old in device.request() and len(old) == 3):
        with pytest.raises(Unauthenticated):
            membership.identify(ssl.DER_cert_to_PEM_cert(der.replace(old, new)).encode())
    if old in device.request():
        with pytest.raises(InvalidMessage, match="the signing request"):
            await membership.renew(membership.identify(shown), device.request().replace(old, new))


async def test_a_token_is_kept_as_a_hash_only_and_used_up(home: Home, membership: Membership) -> None:
    token, expires_at = await membership.issue("alice", Role.DEVICE, 60, replacing=False)
    assert expires_at == NOON + timedelta(seconds=60)
    assert token.secret not in str(home.store.tokens).encode()
    await membership.enrol(*Device().asks(token))
    with pytest.raises(TokenRefused, match="has been used, by this device or another"):
        await membership.enrol(*Device().asks(token))


async def test_the_same_device_may_ask_again_after_a_lost_answer_also_after_a_restart(
    home: Home, membership: Membership, clock: Clock
) -> None:
    token, _ = await membership.issue("alice", Role.DEVICE, 60, replacing=False)
    device = Device()
    first, _ = await membership.enrol(*device.asks(token))
    await home.restart()
    restarted = Membership(home.store, membership._authority, 3600.0, clock)
    second, _ = await restarted.enrol(*device.asks(token))
    assert restarted.identify(pem(first)).key == restarted.identify(pem(second)).key


async def test_a_used_token_does_not_bring_anybody_back(membership: Membership) -> None:
    token, _ = await membership.issue("alice", Role.OPERATOR, 0, replacing=False)
    device = Device()
    await membership.enrol(*device.asks(token))
    await membership.revoke("alice", "stolen")
    with pytest.raises(TokenRefused, match="the token of alice is void"):
        await membership.enrol(*device.asks(token))


async def test_nor_does_it_take_the_place_of_who_has_enrolled_since(membership: Membership) -> None:
    token, _ = await membership.issue("alice", Role.DEVICE, 0, replacing=False)
    old = Device()
    await membership.enrol(*old.asks(token))
    _, new = await enrolled(membership)
    with pytest.raises(TokenRefused, match="void: alice was revoked, or has enrolled with another"):
        await membership.enrol(*old.asks(token))
    assert membership.identify(new).name == "alice"


async def test_in_plain_text_nobody_is_revoked(home: Home, clock: Clock) -> None:
    plain = Membership(home.store, None, 3600.0, clock, certified=False)
    with pytest.raises(WrongState, match="in plain text nobody is known"):
        await plain.revoke("alice", "gone")


async def test_tokens_that_are_not_valid(membership: Membership, clock: Clock) -> None:
    with pytest.raises(TokenRefused, match="unknown here"):
        await membership.enrol(*Device().asks(Token("alice", 1, bytes(32))))
    token, _ = await membership.issue("alice", Role.DEVICE, 60, replacing=False)
    clock.now += timedelta(seconds=60)
    with pytest.raises(TokenRefused, match=r"the token of alice expired on 2025-06-01 12:01 UTC"):
        await membership.enrol(*Device().asks(token))


async def test_two_tokens_for_one_name_make_one_member(membership: Membership) -> None:
    tokens = [(await membership.issue("alice", Role.DEVICE, 0, replacing=False))[0] for _ in range(2)]
    await membership.enrol(*Device().asks(tokens[0]))
    with pytest.raises(TokenRefused, match="the token of alice is void"):
        await membership.enrol(*Device().asks(tokens[1]))
    with pytest.raises(WrongState, match="alice is enrolled already, as device: give --replace"):
        await membership.issue("alice", Role.DEVICE, 0, replacing=False)


async def test_a_new_device_in_the_place_of_an_old_one(membership: Membership) -> None:
    told: list[str] = []
    membership.replaced = lambda name, reason: told.append(f"{name}: {reason}")
    _, old = await enrolled(membership)
    assert told == []
    _, new = await enrolled(membership)
    assert told == ["alice: alice has enrolled anew, with other keys"]
    assert membership.identify(new).name == "alice"
    with pytest.raises(Unauthenticated, match="alice has enrolled anew"):
        membership.identify(old)


async def test_revocation(home: Home, membership: Membership) -> None:
    told: list[str] = []
    membership.expelled = lambda name, reason: told.append(reason)
    _, certificate = await enrolled(membership)
    spare, _ = await membership.issue("alice", Role.DEVICE, 0, replacing=True)
    member = await membership.revoke("alice", "stolen")
    assert (member.revoked_at, told) == (NOON, ["alice does not belong any more: stolen"])
    with pytest.raises(Revoked, match="alice does not belong any more: stolen"):
        membership.identify(certificate)
    with pytest.raises(TokenRefused, match="the token of alice is void"):
        await membership.enrol(*Device().asks(spare))
    with pytest.raises(WrongState, match="was revoked on 2025-06-01"):
        await membership.revoke("alice", "again")
    with pytest.raises(ConfigError, match=r"'bob' has not enrolled; there is alice"):
        await membership.revoke("bob", "")
    await home.restart()
    assert home.store.members["alice"].reason == "stolen"
    events = await home.store.events(10)
    assert [event.what for event in reversed(events)] == ["token issued", "enrolled", "token issued", "revoked"]


async def test_a_token_that_nobody_used_is_voided_with_the_name(membership: Membership) -> None:
    token, _ = await membership.issue("bob", Role.VIEWER, 0, replacing=False)
    member = await membership.revoke("bob", "not hired after all")
    assert member.role is Role.VIEWER
    with pytest.raises(TokenRefused, match="void"):
        await membership.enrol(*Device().asks(token))


async def test_a_certificate_expires(membership: Membership, clock: Clock) -> None:
    _, certificate = await enrolled(membership)
    clock.now += HOUR - timedelta(seconds=1)
    assert membership.identify(certificate).name == "alice"
    clock.now += timedelta(seconds=1)
    with pytest.raises(Unauthenticated, match="the certificate of alice expired on 2025-06-01 13:00 UTC"):
        membership.identify(certificate)


async def test_renewal_is_for_the_same_key_only(membership: Membership, clock: Clock) -> None:
    device, certificate = await enrolled(membership)
    caller = membership.identify(certificate)
    clock.now += HOUR / 2
    renewed, _ = await membership.renew(caller, device.request())
    assert membership.identify(pem(renewed)).expires_at == clock.now + HOUR
    with pytest.raises(NotAllowed, match="for another key than the enrolled one"):
        await membership.renew(caller, Device().request())
    with pytest.raises(NotAllowed):
        await membership.renew(Caller("bob", Role.DEVICE, True), device.request())


@pytest.mark.parametrize("role", list(Role))
async def test_a_devices_signing_key_is_certified_at_enrolment_and_renewal(membership: Membership, role: Role) -> None:
    token, _ = await membership.issue("alice", role, 0, replacing=False)
    device = Device()
    certificate, enrolled = await membership.enrol(*device.asks(token))
    _, renewed = await membership.renew(membership.identify(pem(certificate)), device.request())
    assert membership._authority is not None
    ca = membership._authority.certificate.public_bytes(Encoding.PEM)
    for member in (enrolled, renewed):
        voucher = membership.voucher(member)
        if role is Role.DEVICE:
            check(voucher, "alice", device.signing.public_key().public_bytes_raw(), ca, datetime.now(UTC))
        else:
            assert voucher == b""  # who steers takes no part in a sum


async def test_whose_key_is_not_known_gets_no_voucher(home: Home, membership: Membership, clock: Clock) -> None:
    elsewhere = Membership(home.store, None, 3600.0, clock)
    assert membership.voucher(MemberRecord("alice", Role.DEVICE)) == b""
    assert elsewhere.voucher(MemberRecord("alice", Role.DEVICE, signing_key=bytes(32))) == b""


async def test_requests_that_prove_nothing(membership: Membership) -> None:
    token, _ = await membership.issue("alice", Role.DEVICE, 0, replacing=False)
    secret, request, signing_key, signature = Device().asks(token)
    weak = Device()
    weak.key = rsa.generate_private_key(65537, 2048)
    other = Device()
    other.key = ec.generate_private_key(ec.SECP384R1())
    tampered = bytearray(request)
    tampered[-1] ^= 1
    for wrong, told in (
        ((secret, b"", signing_key, signature), "cannot be read"),
        ((secret, bytes(5000), signing_key, signature), "a signing request of 5000 bytes"),
        ((secret, bytes(tampered), signing_key, signature), "signing request"),
        ((secret, request, signing_key, bytes(64)), "its signature of the request is wrong"),
        ((secret, request, b"short", signature), "its signature of the request is wrong"),
        ((secret, Device().request(), signing_key, signature), "its signature of the request is wrong"),
        (weak.asks(token), "for a key of another kind"),
        (other.asks(token), "for a key of another kind"),
    ):
        with pytest.raises(InvalidMessage, match=told):
            await membership.enrol(*wrong)
    await membership.enrol(secret, request, signing_key, signature)  # none of that has used the token


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "x" * 65, "zoë", "a\n"])
async def test_names_that_nobody_may_have(membership: Membership, name: str) -> None:
    with pytest.raises(ConfigError, match="is not allowed"):
        await membership.issue(name, Role.DEVICE, 0, replacing=False)


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), 31_536_001])
async def test_times_for_which_no_token_is_valid(membership: Membership, seconds: float) -> None:
    with pytest.raises(ConfigError, match="a token cannot expire after"):
        await membership.issue("alice", Role.DEVICE, seconds, replacing=False)


async def test_certificates_of_another_authority_go_by_name(
    home: Home, membership: Membership, clock: Clock, tmp_path: Path
) -> None:
    theirs = Authority.load(tmp_path / "ca.pem", tmp_path / "ca.key")
    own = Membership(home.store, None, 3600.0, clock, Roles(frozenset({"carol"}), frozenset({"dave"})))
    shown = {name: pem(theirs.certify(Device().key.public_key(), name, "x", 3600, NOON)) for name in ("alice", "carol", "dave")}
    assert [own.identify(shown[name]).role for name in shown] == [Role.DEVICE, Role.OPERATOR, Role.VIEWER]
    await own.revoke("alice", "left")
    with pytest.raises(Revoked, match="left"):
        own.identify(shown["alice"])
    with pytest.raises(WrongState, match="this coordinator enrols nobody"):
        await own.issue("erin", Role.DEVICE, 0, replacing=False)
    with pytest.raises(WrongState, match="enrols nobody"):
        await own.enrol(b"", b"", b"", b"")
    with pytest.raises(WrongState, match="signs no certificates"):
        await own.renew(own.identify(shown["carol"]), Device().request())
    for name in ("../etc", "", "a b"):
        with pytest.raises(Unauthenticated, match="is no name here"):
            own.identify(pem(theirs.certify(Device().key.public_key(), name or " ", "x", 3600, NOON)))
    with pytest.raises(Unauthenticated, match="cannot be read"):
        own.identify(b"nonsense")
