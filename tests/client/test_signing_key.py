"""A device's signing key and what certifies it: where they lie, and which counts."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from choral.errors import TrustError
from choral.voucher import Voucher
from choral_client.signing_key import SigningKey
from client.authorities import Authority
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

ISSUER = Authority.made()


def pem(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def voucher(name: str, key: bytes, authority: Authority = ISSUER) -> Voucher:
    return Voucher(name, key, authority.vouch(name, key))


def issued(state: Path, content: str) -> None:
    """What enrolment and renewal leave in the identity."""
    (state / "identity").mkdir(exist_ok=True)
    (state / "identity" / "signing.voucher").write_text(content)


def test_a_key_is_made_once_for_this_user_alone(tmp_path: Path) -> None:
    state = tmp_path / "a" / "b"
    first = SigningKey.of(state)
    assert SigningKey.of(state).public == first.public
    assert [path.name for path in state.iterdir()] == ["signing.key"]
    assert stat.S_IMODE((state / "signing.key").stat().st_mode) == 0o600
    ed25519.Ed25519PublicKey.from_public_bytes(first.public).verify(first.signer("alice").sign(b"said"), b"said")
    assert first.signer("alice").voucher == b""


def test_an_enrolled_device_has_that_of_its_identity(tmp_path: Path) -> None:
    own, enrolled = SigningKey.of(tmp_path), ed25519.Ed25519PrivateKey.generate()
    (tmp_path / "identity").mkdir()
    assert SigningKey.of(tmp_path).public == own.public  # an identity that has none: made by hand
    (tmp_path / "identity" / "signing.key").write_bytes(pem(enrolled))
    assert SigningKey.of(tmp_path).public == enrolled.public_key().public_bytes_raw()


@pytest.mark.parametrize("content", [b"", b"nonsense", pem(ec.generate_private_key(ec.SECP256R1()))])
def test_a_key_that_cannot_sign_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "signing.key").write_bytes(content)
    with pytest.raises(TrustError, match=r"signing\.key holds"):
        SigningKey.of(tmp_path)
    assert (tmp_path / "signing.key").read_bytes() == content


def test_a_state_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TrustError, match="give a --state that this user may write"):
        SigningKey.of(tmp_path / "file")


def test_what_the_coordinator_issues_is_shown_as_soon_as_it_is_there(tmp_path: Path) -> None:
    key = SigningKey.of(tmp_path)
    assert key.signer("alice").voucher == b""
    made = voucher("alice", key.public)
    issued(tmp_path, str(made))
    assert key.signer("alice").voucher == made.signature
    assert key.signer("bob").voucher == b""  # a folder that once enrolled as another
    issued(tmp_path, str(voucher("alice", bytes(32))))
    assert key.signer("alice").voucher == b""


def test_the_owners_voucher_wins_over_the_coordinators(tmp_path: Path) -> None:
    key, elsewhere = SigningKey.of(tmp_path), Authority.made()
    made = voucher("alice", key.public, elsewhere)
    assert key.keep(made) == tmp_path / "signing.voucher"
    issued(tmp_path, str(voucher("alice", key.public)))  # renewal brings another
    assert key.signer("alice").voucher == made.signature


def test_an_owners_voucher_for_something_else_is_named(tmp_path: Path) -> None:
    key = SigningKey.of(tmp_path)
    other = voucher("alice", bytes(32))
    with pytest.raises(TrustError, match=r"the voucher is for a key with the fingerprint sha256:.*and this device's has sha256:"):
        key.keep(other)
    assert not (tmp_path / "signing.voucher").exists()
    (tmp_path / "signing.voucher").write_text(str(other))
    with pytest.raises(TrustError, match=r"signing\.voucher is for a key with the fingerprint"):
        key.signer("alice")
    key.keep(voucher("alice", key.public))
    with pytest.raises(TrustError, match=r"signing\.voucher is for alice, and this client is bob: ask its authority"):
        key.signer("bob")


@pytest.mark.parametrize("where", ["signing.voucher", "identity/signing.voucher"])
def test_a_damaged_voucher_is_named(tmp_path: Path, where: str) -> None:
    key = SigningKey.of(tmp_path)
    issued(tmp_path, str(voucher("alice", key.public)))
    (tmp_path / where).write_text("half of")
    with pytest.raises(TrustError, match=r"signing\.voucher holds no voucher"):
        key.signer("alice")
