"""What clients agree on, seal for each other, and can be recovered of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from choral.errors import InvalidMessage
from choral.secagg import keys
from choral.secagg.keys import Shares, Shown
from choral.secagg.shamir import PRIME
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

SESSION, ANOTHER, PAIR = bytes(32), bytes(31) + b"\x01", b"alice and bob"


def test_two_clients_have_the_same_mask_and_nobody_else_has() -> None:
    alice, bob, carol = keys.fresh(), keys.fresh(), keys.fresh()
    ours = keys.pair_mask(alice.mask_key, bob.shown().mask_key, SESSION, PAIR)
    assert keys.pair_mask(bob.mask_key, alice.shown().mask_key, SESSION, PAIR) == ours
    assert keys.pair_mask(carol.mask_key, alice.shown().mask_key, SESSION, PAIR) != ours
    assert keys.pair_mask(alice.mask_key, bob.shown().mask_key, ANOTHER, PAIR) != ours
    assert keys.pair_mask(alice.mask_key, bob.shown().mask_key, SESSION, b"others") != ours


def test_a_recovered_key_seed_makes_the_mask_key_and_is_known_to_be_right() -> None:
    alice, bob = keys.fresh(), keys.fresh()
    again = keys.mask_key_of(alice.key_seed)
    ours = keys.pair_mask(bob.mask_key, alice.shown().mask_key, SESSION, PAIR)
    assert keys.pair_mask(again, bob.shown().mask_key, SESSION, PAIR) == ours
    assert keys.is_key_seed(alice.key_seed, alice.shown())
    assert not keys.is_key_seed((alice.key_seed + 1) % PRIME, alice.shown())
    assert not keys.is_key_seed(bob.key_seed, alice.shown())


def test_a_recovered_mask_seed_is_known_by_its_commitment() -> None:
    alice = keys.fresh()
    assert keys.commitment(alice.mask_seed) == alice.shown().commitment
    assert keys.commitment((alice.mask_seed + 1) % PRIME) != alice.shown().commitment


def test_a_self_mask_is_of_one_session() -> None:
    assert keys.self_mask(7, SESSION) == keys.self_mask(7, SESSION)
    assert len({keys.self_mask(7, SESSION), keys.self_mask(7, ANOTHER), keys.self_mask(8, SESSION)}) == 3


def test_secrets_are_never_the_same_and_are_not_printed() -> None:
    one, other = keys.fresh(), keys.fresh()
    assert one.shown() != other.shown()
    for number in (one.mask_seed, one.key_seed):
        assert str(number) not in repr(one)
    assert "12345" not in repr(Shares(12345, 12345))


def test_shares_are_read_by_whom_they_are_for() -> None:
    alice, bob = keys.fresh(), keys.fresh()
    sealed = keys.seal(Shares(5, PRIME - 1), alice.share_key, bob.shown().share_key, SESSION, "alice", "bob")
    assert keys.unseal(sealed, bob.share_key, alice.shown().share_key, SESSION, "alice", "bob") == Shares(5, PRIME - 1)


@pytest.mark.parametrize(
    ("session", "sender", "receiver"),
    [(ANOTHER, "alice", "bob"), (SESSION, "bob", "alice"), (SESSION, "alice", "carol"), (SESSION, "carol", "bob")],
)
def test_shares_of_another_session_or_between_others_are_refused(session: bytes, sender: str, receiver: str) -> None:
    alice, bob = keys.fresh(), keys.fresh()
    sealed = keys.seal(Shares(5, 6), alice.share_key, bob.shown().share_key, SESSION, "alice", "bob")
    with pytest.raises(InvalidMessage, match=f"the shares from {sender} are not what it has sealed for {receiver} in this round"):
        keys.unseal(sealed, bob.share_key, alice.shown().share_key, session, sender, receiver)


@pytest.mark.parametrize("at", [0, 31, 32, 63, 79])
def test_tampered_shares_are_refused(at: int) -> None:
    alice, bob = keys.fresh(), keys.fresh()
    sealed = bytearray(keys.seal(Shares(5, 6), alice.share_key, bob.shown().share_key, SESSION, "alice", "bob"))
    sealed[at] ^= 1
    with pytest.raises(InvalidMessage, match="are not what it has sealed"):
        keys.unseal(bytes(sealed), bob.share_key, alice.shown().share_key, SESSION, "alice", "bob")


@pytest.mark.parametrize("sealed", [b"", b"short", bytes(1000)])
def test_what_was_never_sealed_is_refused(sealed: bytes) -> None:
    alice, bob = keys.fresh(), keys.fresh()
    with pytest.raises(InvalidMessage, match="are not what it has sealed"):
        keys.unseal(sealed, bob.share_key, alice.shown().share_key, SESSION, "alice", "bob")


def test_numbers_that_are_no_shares_are_refused() -> None:
    alice, bob = keys.fresh(), keys.fresh()
    sealed = keys.seal(Shares(PRIME, 6), alice.share_key, bob.shown().share_key, SESSION, "alice", "bob")
    with pytest.raises(InvalidMessage, match=r"no two numbers below 2\^255 - 19"):
        keys.unseal(sealed, bob.share_key, alice.shown().share_key, SESSION, "alice", "bob")


@pytest.mark.parametrize("theirs", [b"", bytes(31), bytes(32), bytes(33), b"\x01" + bytes(31)])
def test_a_key_with_which_everybody_agrees_on_the_same_is_refused(theirs: bytes) -> None:
    with pytest.raises(InvalidMessage, match="is no X25519 key to agree with"):
        keys.pair_mask(X25519PrivateKey.generate(), theirs, SESSION, PAIR)


def with_the_high_bit(key: bytes) -> bytes:
    return key[:-1] + bytes([key[-1] ^ 0x80])


def plus_the_prime(key: bytes) -> bytes:
    return (int.from_bytes(key, "little") + 2**255 - 19).to_bytes(32, "little")


def test_a_key_is_known_however_it_is_written() -> None:
    shown = keys.fresh().shown()
    again = Shown(with_the_high_bit(shown.mask_key), shown.share_key, shown.commitment)
    assert keys.points(again) == keys.points(shown)
    small = Shown((3).to_bytes(32, "little"), shown.share_key, shown.commitment)
    assert keys.points(Shown(plus_the_prime(small.mask_key), shown.share_key, shown.commitment)) == keys.points(small)


@pytest.mark.parametrize("which", ["mask_key", "share_key"])
@pytest.mark.parametrize(
    ("key", "told"),
    [
        (bytes(32), "shows what is no key"),
        (b"\x01" + bytes(31), "shows what is no key"),
        (bytes(31), "of another length"),
    ],
)
def test_what_is_shown_must_be_keys(which: str, key: bytes, told: str) -> None:
    with pytest.raises(InvalidMessage, match=told):
        keys.check_shown("alice", replace(keys.fresh().shown(), **{which: key}))


@pytest.mark.parametrize("written", [lambda key: key, with_the_high_bit])
def test_one_key_is_not_for_two_purposes(written: Callable[[bytes], bytes]) -> None:
    shown = keys.fresh().shown()
    with pytest.raises(InvalidMessage, match="alice shows one key for two purposes"):
        keys.check_shown("alice", replace(shown, share_key=written(shown.mask_key)))


@pytest.mark.parametrize("point", sorted(keys._LOW_ORDER))
def test_with_a_point_of_low_order_nobody_agrees_on_anything(point: int) -> None:
    encoded = point.to_bytes(32, "little")
    with pytest.raises(InvalidMessage, match="is no X25519 key to agree with"):
        keys.pair_mask(X25519PrivateKey.generate(), encoded, SESSION, PAIR)
    with pytest.raises(InvalidMessage, match="alice shows what is no key"):
        keys.check_shown("alice", replace(keys.fresh().shown(), mask_key=encoded))
