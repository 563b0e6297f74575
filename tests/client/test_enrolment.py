"""What a client makes of a coordinator's answers to enrolment and renewal, be they what they may."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from choral.address import HostPort
from choral.errors import TrustError
from choral.identity import Identity, read_identity
from choral.v1 import enrolment_pb2 as pb
from choral.voucher import Voucher, sign
from choral_client import enrolment
from choral_client.signing_key import SigningKey
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

SERVER = HostPort("127.0.0.1", 8470)


def certificate(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "alice")])
    now = datetime.now(UTC)
    built = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
    built = built.serial_number(x509.random_serial_number()).not_valid_before(now).not_valid_after(now + timedelta(days=1))
    return built.sign(key, hashes.SHA256())


@dataclass
class Joining:
    """A client that has asked, and what it may be answered."""

    state: Path
    key: Any

    def answered(self, name: str = "alice", key: Any = None, role: str = "device", voucher: bytes = b"") -> Identity:
        made = certificate(key or self.key)
        answer = pb.EnrolResponse(certificate=made.public_bytes(Encoding.DER), name=name, role=role, voucher=voucher)
        return enrolment._settled(self.state, "alice", SERVER, made.public_bytes(Encoding.PEM), answer)

    def voucher(self, name: str = "alice", signing_key: bytes | None = None) -> bytes:
        """By the authority that `answered` names: the client's own key, to need one certificate less."""
        return sign(self.key, name, signing_key or SigningKey.of(self.state).public)


@pytest.fixture
def joining(tmp_path: Path) -> Joining:
    fresh = tmp_path / "identity.new"
    enrolment._make_keys(fresh)
    return Joining(tmp_path, load_pem_private_key((fresh / "tls.key").read_bytes(), None))


def test_an_identity_is_kept(joining: Joining) -> None:
    known = joining.answered()
    assert (known.name, known.role, known.server) == ("alice", "device", SERVER)
    assert enrolment.held(joining.state) == known


@pytest.mark.parametrize("name", ["bob", "", "../../escaped", "/etc", "x" * 10_000])
def test_the_coordinator_does_not_choose_another_name(joining: Joining, name: str) -> None:
    with pytest.raises(TrustError, match="and the token is for alice") as refused:
        joining.answered(name)
    assert len(str(refused.value)) < 300
    assert enrolment.held(joining.state) is None


def test_a_certificate_for_another_key_takes_no_place(joining: Joining) -> None:
    with pytest.raises(TrustError, match="is not the key of"):
        joining.answered(key=ec.generate_private_key(ec.SECP256R1()))
    assert not (joining.state / "identity").exists()


def test_a_renewed_certificate_takes_the_place_of_the_old(joining: Joining) -> None:
    known, made = joining.answered(), certificate(joining.key)
    renewed = enrolment._renewed(known, pb.RenewResponse(certificate=made.public_bytes(Encoding.DER)))
    assert renewed.credentials.certificate == made.public_bytes(Encoding.PEM)
    assert renewed == read_identity(known.folder)


@pytest.mark.parametrize("what", ["nothing", "version", "another key"])
def test_a_renewed_certificate_that_cannot_be_used_leaves_the_old(joining: Joining, what: str) -> None:
    known, der = joining.answered(), certificate(joining.key).public_bytes(Encoding.DER)
    answers = {
        "nothing": b"",
        "version": der.replace(b"\x02\x01\x02", b"\x02\x01\x07", 1),
        "another key": certificate(ec.generate_private_key(ec.SECP256R1())).public_bytes(Encoding.DER),
    }
    there = sorted(path.name for path in known.folder.iterdir())
    with pytest.raises(TrustError):
        enrolment._renewed(known, pb.RenewResponse(certificate=answers[what]))
    assert read_identity(known.folder) == known
    assert sorted(path.name for path in known.folder.iterdir()) == there


# What certifies the signing key


def signing_key_in(folder: Path) -> bytes:
    key: Any = load_pem_private_key((folder / "signing.key").read_bytes(), None)
    public: bytes = key.public_key().public_bytes_raw()
    return public


def test_a_voucher_is_kept_with_the_identity(joining: Joining) -> None:
    key = signing_key_in(joining.state / "identity.new")
    made = joining.voucher(signing_key=key)
    kept = joining.answered(voucher=made).folder / "signing.voucher"
    assert Voucher.parse(kept.read_bytes(), "") == Voucher("alice", key, made)
    assert SigningKey.of(joining.state).signer("alice").voucher == made


@pytest.mark.parametrize("wrong", ["name", "key", "authority", "bytes"])
def test_a_voucher_that_nobody_would_accept_takes_no_place(joining: Joining, wrong: str) -> None:
    key = signing_key_in(joining.state / "identity.new")
    voucher = {
        "name": joining.voucher("bob", key),
        "key": joining.voucher(signing_key=bytes(32)),
        "authority": sign(ec.generate_private_key(ec.SECP256R1()), "alice", key),
        "bytes": b"nonsense",
    }[wrong]
    with pytest.raises(TrustError, match="answered with a voucher that nobody would accept"):
        joining.answered(voucher=voucher)
    assert enrolment.held(joining.state) is None
    known = joining.answered()
    made = certificate(joining.key).public_bytes(Encoding.DER)
    with pytest.raises(TrustError, match="answered with a voucher that nobody would accept"):
        enrolment._renewed(known, pb.RenewResponse(certificate=made, voucher=voucher))
    assert read_identity(known.folder) == known
    assert not (known.folder / "signing.voucher").exists()


def test_an_identity_from_before_gets_its_voucher_with_the_next_certificate(joining: Joining) -> None:
    known = joining.answered()
    key = SigningKey.of(joining.state)
    assert key.signer("alice").voucher == b""
    again, issued = certificate(joining.key), joining.voucher()
    enrolment._renewed(known, pb.RenewResponse(certificate=again.public_bytes(Encoding.DER), voucher=issued))
    assert key.signer("alice").voucher == issued
    enrolment._renewed(known, pb.RenewResponse(certificate=again.public_bytes(Encoding.DER)))  # by an older coordinator
    assert key.signer("alice").voucher == issued


@pytest.mark.parametrize("where", ["", "identity"])
def test_who_enrols_with_a_signing_key_keeps_it(tmp_path: Path, where: str) -> None:
    made = SigningKey.of(tmp_path / where).public
    enrolment._make_keys(tmp_path / "identity.new")
    assert signing_key_in(tmp_path / "identity.new") == made


def test_one_that_is_damaged_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / "signing.key").write_text("nonsense")
    enrolment._make_keys(tmp_path / "identity.new")
    assert len(signing_key_in(tmp_path / "identity.new")) == 32


@pytest.mark.parametrize("name", ["../x", "", None, "x" * 65])
def test_an_identity_with_a_name_that_nobody_may_have_is_damaged(joining: Joining, name: str | None) -> None:
    about = joining.answered().folder / "about.json"
    about.write_text(about.read_text().replace('"alice"', "{}" if name is None else f'"{name}"'))
    with pytest.raises(TrustError, match="is damaged"):
        read_identity(about.parent)
