from __future__ import annotations

import pytest
from choral.canonical import canonical
from choral.heads import Head, fault_of, from_line, is_genuine, signed_part, to_line
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as some

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
DIGEST = bytes(range(100, 132))


def head(sequence: int = 7, digest: bytes = DIGEST) -> Head:
    return Head(sequence, digest, KEY.sign(signed_part(sequence, digest)), KEY.public_key().public_bytes_raw())


def flipped(value: bytes) -> bytes:
    return bytes([value[0] ^ 1]) + value[1:]


def test_what_is_signed_is_what_the_contract_says() -> None:
    assert signed_part(258, DIGEST) == b"choral history 1\x00\x00\x00\x00\x00\x00\x01\x02" + DIGEST


def test_only_a_head_as_it_was_signed_is_genuine() -> None:
    good = head()
    assert is_genuine(good)
    assert not is_genuine(Head(8, good.digest, good.signature, good.key))
    assert not is_genuine(Head(7, flipped(good.digest), good.signature, good.key))
    assert not is_genuine(Head(7, good.digest, flipped(good.signature), good.key))
    assert not is_genuine(Head(7, good.digest, good.signature, flipped(good.key)))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (Head(0, DIGEST, bytes(64), bytes(32)), "entry 0: entries are counted from 1"),
        (Head(2**63, DIGEST, bytes(64), bytes(32)), f"entry {2**63}: entries are counted from 1"),
        (Head(1, DIGEST[1:], bytes(64), bytes(32)), "its digest has 31 bytes instead of 32"),
        (Head(1, DIGEST, bytes(65), bytes(32)), "its signature has 65 bytes instead of 64"),
        (Head(1, DIGEST, bytes(64), b""), "its key has 0 bytes instead of 32"),
    ],
)
def test_what_can_be_no_head_is_named(wrong: Head, told: str) -> None:
    assert fault_of(wrong) == told
    assert not is_genuine(wrong)
    with pytest.raises(ValueError, match=told):
        from_line(to_line(wrong))


def test_a_line_brings_a_head_back() -> None:
    assert from_line(to_line(head())) == head()
    for wrong in ("", "[]", "{}", '{"sequence":1}', '"text"', '{"sequence":"1","digest":"","signature":"","key":""}', "{"):
        with pytest.raises(ValueError):
            from_line(wrong)


@given(some.dictionaries(some.text(some.characters()), some.text(some.characters()) | some.integers() | some.none()))
def test_a_value_has_one_canonical_text_and_it_is_ascii(value: dict[str, object]) -> None:
    text = canonical(value)
    assert text.isascii()
    assert "\0" not in text
    assert canonical(dict(reversed(value.items()))) == text


def test_the_canonical_text_of_what_databases_cannot_hold() -> None:
    assert canonical({"b": "a\0\ud800é", "a": 1.5}) == '{"a":1.5,"b":"a\\u0000\\ud800\\u00e9"}'
    with pytest.raises(ValueError):
        canonical({"a": float("nan")})
