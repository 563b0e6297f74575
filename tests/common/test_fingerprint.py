from __future__ import annotations

import pytest
from choral.fingerprint import fingerprint, parse_fingerprint, parse_key, shown_fingerprint, shown_key

ZEROS = "66687aadf862bd776c8fc18b8e9f8e20089714856ee233b3902a591d0d5f2925"  # sha256sum of 32 zero bytes


def test_a_fingerprint_is_the_sha_256_of_the_raw_key() -> None:
    assert fingerprint(bytes(32)) == ZEROS


@pytest.mark.parametrize("text", [ZEROS, f"sha256:{ZEROS}", ZEROS.upper()])
def test_a_fingerprint_is_read_with_and_without_its_mark(text: str) -> None:
    assert parse_fingerprint(text) == ZEROS
    assert parse_fingerprint(shown_fingerprint(bytes(32))) == ZEROS


@pytest.mark.parametrize("text", ["", ZEROS[:-1], f"{ZEROS}0", f"{ZEROS}\n", f" {ZEROS}", f"sha1:{ZEROS}", "g" * 64, "٠" * 64])
def test_what_is_no_fingerprint_is_told_the_form(text: str) -> None:
    with pytest.raises(ValueError, match="a fingerprint is 64 hexadecimal digits: copy what `choral client fingerprint` prints"):
        parse_fingerprint(text)


def test_a_key_and_its_fingerprint_are_not_taken_for_each_other() -> None:
    with pytest.raises(ValueError, match="this is a key, not its fingerprint"):
        parse_fingerprint(shown_key(bytes(32)))
    with pytest.raises(ValueError, match="this is a fingerprint, which does not hold the key"):
        parse_key(shown_fingerprint(bytes(32)))


@pytest.mark.parametrize("text", ["ab" * 32, "ed25519:" + "ab" * 32, "AB" * 32])
def test_a_key_is_read_with_and_without_its_mark(text: str) -> None:
    assert parse_key(text) == b"\xab" * 32
    assert parse_key(shown_key(b"\xab" * 32)) == b"\xab" * 32


@pytest.mark.parametrize("text", ["", "ab" * 31, "ab" * 33, "ab " * 21 + "a", "ed25519:", "xy" * 32])
def test_what_is_no_key_is_told_the_form(text: str) -> None:
    with pytest.raises(ValueError, match="a signing key is 64 hexadecimal digits"):
        parse_key(text)
