"""What an authority says of a signing key, and that nothing else is taken for it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from choral.errors import Deceived, TrustError
from choral.voucher import LONGEST_BYTES, Voucher, check, sign, statement
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding

NOW = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
YEAR = timedelta(days=365)
KEY = bytes(range(32))
P256 = ec.generate_private_key(ec.SECP256R1())
RSA = rsa.generate_private_key(65537, 2048)


def certificate(private: Any) -> bytes:
    """An authority's own, from a year ago until in a year."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "authority")])
    built = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(private.public_key())
    built = built.serial_number(1).not_valid_before(NOW - YEAR).not_valid_after(NOW + YEAR)
    signed_with = None if isinstance(private, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return built.sign(private, signed_with).public_bytes(Encoding.PEM)


def test_the_statement_is_what_other_languages_can_write() -> None:
    assert statement("älice", b"\x01" * 2) == b'{"choral member":1,"key":"0101","name":"\\u00e4lice"}'


@pytest.mark.parametrize("private", [P256, RSA, ec.generate_private_key(ec.SECP384R1())])
def test_what_an_authority_has_signed_is_accepted(private: Any) -> None:
    voucher = sign(private, "alice", KEY)
    check(voucher, "alice", KEY, certificate(private), NOW)
    check(voucher, "alice", KEY, certificate(ed25519.Ed25519PrivateKey.generate()) + certificate(private), NOW)  # one of several


def test_it_is_small() -> None:
    assert len(sign(P256, "alice", KEY)) <= 72


@pytest.mark.parametrize(
    ("name", "key", "authority"),
    [
        ("bob", KEY, P256),
        ("alice2", KEY, P256),
        ("", KEY, P256),
        ("alice", KEY[::-1], P256),
        ("alice", KEY + b"\0", P256),
        ("alice", b"", P256),
        ("alice", KEY, ec.generate_private_key(ec.SECP256R1())),
        ("alice", KEY, RSA),
        ("alice", KEY, ed25519.Ed25519PrivateKey.generate()),
    ],
)
def test_a_voucher_is_for_one_name_and_key_and_by_one_authority(name: str, key: bytes, authority: Any) -> None:
    with pytest.raises(Deceived, match=rf"the signing key of {name} \(sha256:.{{64}}\) is not certified by an authority"):
        check(sign(P256, "alice", KEY), name, key, certificate(authority), NOW)


@pytest.mark.parametrize("private", [P256, RSA])
def test_forged_and_damaged_bytes_are_refused(private: Any) -> None:
    good, authority = sign(private, "alice", KEY), certificate(private)
    flipped = [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in range(len(good))]
    for wrong in [*flipped, good[:-1], good + b"\0", b"\0", bytes(64), b"x" * 100_000]:
        with pytest.raises(Deceived, match="somebody poses as alice"):
            check(wrong, "alice", KEY, authority, NOW)


def test_the_key_that_is_certified_certifies_nobody() -> None:
    """Nor does one that signs with another hash or padding."""
    own = ed25519.Ed25519PrivateKey.generate()
    said = statement("alice", KEY)
    for wrong in (
        own.sign(said),
        P256.sign(said, ec.ECDSA(hashes.SHA512())),
        RSA.sign(said, padding.PSS(padding.MGF1(hashes.SHA256()), 32), hashes.SHA256()),
    ):
        with pytest.raises(Deceived):
            check(wrong, "alice", KEY, certificate(P256) + certificate(RSA), NOW)


def test_a_client_without_a_voucher_is_told_how_to_get_one() -> None:
    with pytest.raises(
        Deceived, match=r"nobody certifies the signing key of alice .*: let alice renew its certificate .* pin it in"
    ):
        check(b"", "alice", KEY, certificate(P256), NOW)


@pytest.mark.parametrize(
    ("passed", "holds"), [(YEAR, True), (YEAR + timedelta(seconds=1), False), (-YEAR, True), (-2 * YEAR, False)]
)
def test_it_holds_as_long_as_the_authoritys_certificate(passed: timedelta, holds: bool) -> None:
    voucher = sign(P256, "alice", KEY)
    if holds:
        check(voucher, "alice", KEY, certificate(P256), NOW + passed)
    else:
        with pytest.raises(Deceived, match=f"is valid on {NOW + passed:%Y-%m-%d}: look at this device's clock"):
            check(voucher, "alice", KEY, certificate(P256), NOW + passed)


@pytest.mark.parametrize("authorities", [b"", b"nonsense", certificate(P256)[:-40]])
def test_an_authority_that_is_none_is_named(authorities: bytes) -> None:
    with pytest.raises(TrustError, match="no certificate in PEM form"):
        check(sign(P256, "alice", KEY), "alice", KEY, authorities, NOW)


# In a file


def test_a_file_has_all_that_it_is_for() -> None:
    voucher = Voucher("alice", KEY, sign(P256, "alice", KEY))
    assert Voucher.parse(str(voucher).encode(), "file") == voucher


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nonsense",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        b"[" * 100_000,
        b'{"choral voucher":2,"name":"alice","key":"' + b"0" * 64 + b'","signature":""}',
        b'{"choral voucher":1,"name":"../x","key":"' + b"0" * 64 + b'","signature":""}',
        b'{"choral voucher":1,"name":7,"key":7,"signature":7}',
        b'{"choral voucher":1,"name":"alice","key":"' + b"0" * 64 + b'","signature":"xx"}',
        b'{"choral voucher":1,"name":"alice","key":"00","signature":""}',
        b" " * LONGEST_BYTES + b"{}",
    ],
)
def test_what_is_no_voucher_is_told_who_makes_one(content: bytes) -> None:
    with pytest.raises(TrustError, match=r"alice\.voucher holds no voucher \(.*`choral authority certify` makes one"):
        Voucher.parse(content, "alice.voucher")
