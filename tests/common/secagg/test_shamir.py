"""Secrets in shares."""

from __future__ import annotations

import secrets
from itertools import combinations

import pytest
from choral.secagg.shamir import PRIME, Recovery, corrected, split
from hypothesis import given
from hypothesis import strategies as st

NUMBERS = st.integers(0, PRIME - 1)


def test_shares_are_values_of_a_polynomial_and_the_secret_that_at_zero() -> None:
    drawn = [94, 166]  # 94 x² + 166 x + 1234
    shares = split(1234, [1, 2, 3, 4, 5, 6], 3, lambda below: drawn.pop(0))
    assert shares == {1: 1494, 2: 1942, 3: 2578, 4: 3402, 5: 4414, 6: 5614}
    assert Recovery([2, 4, 5]).secret(shares) == 1234


@given(NUMBERS, st.integers(1, 8), st.integers(0, 4))
def test_any_threshold_of_shares_gives_the_secret(secret: int, threshold: int, more: int) -> None:
    holders = list(range(1, threshold + more + 1))
    shares = split(secret, holders, threshold)
    for some in list(combinations(holders, threshold))[:20]:
        assert Recovery(some).secret(shares) == secret


@given(NUMBERS, NUMBERS, st.integers(2, 6))
def test_fewer_shares_are_in_keeping_with_any_secret(secret: int, other: int, threshold: int) -> None:
    """Of a share less than are needed, there is a polynomial through every secret: the shares say nothing."""
    holders = list(range(1, threshold + 1))
    shares = split(secret, holders, threshold)
    known = {0: other} | {holder: shares[holder] for holder in holders[:-1]}
    through = _value_at(known, holders[-1])
    assert Recovery(holders).secret(shares | {holders[-1]: through}) == other


def _value_at(points: dict[int, int], at: int) -> int:
    total = 0
    for one, value in points.items():
        above = below = 1
        for other in points:
            if other != one:
                above, below = above * (at - other) % PRIME, below * (one - other) % PRIME
        total += value * above * pow(below, -1, PRIME)
    return total % PRIME


def test_no_two_splits_are_alike() -> None:
    assert split(7, [1, 2, 3], 2) != split(7, [1, 2, 3], 2)


@pytest.mark.parametrize("secret", [-1, PRIME, PRIME + 5])
def test_a_secret_must_be_below_the_prime(secret: int) -> None:
    with pytest.raises(ValueError, match="no number below"):
        split(secret, [1, 2], 2)


@pytest.mark.parametrize("holders", [[1, 1], [0, 1], [-1, 2], [1, PRIME]])
def test_holders_must_differ_and_none_is_zero(holders: list[int]) -> None:
    with pytest.raises(ValueError, match="different numbers from 1 on"):
        split(5, holders, 2)
    with pytest.raises(ValueError, match="different numbers from 1 on"):
        Recovery(holders)


@pytest.mark.parametrize("threshold", [0, -1, 4])
def test_a_threshold_must_be_one_that_can_be_met(threshold: int) -> None:
    with pytest.raises(ValueError, match=f"a threshold of {threshold} with 3 holders"):
        split(5, [1, 2, 3], threshold)


def test_many_secrets_of_the_same_holders() -> None:
    recovery = Recovery([2, 3, 5])
    for _ in range(20):
        secret = secrets.randbelow(PRIME)
        assert recovery.secret(split(secret, [1, 2, 3, 4, 5], 3)) == secret


@given(st.data())
def test_wrong_shares_are_found_as_long_as_they_are_half_of_those_to_spare(data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, 9))
    holders = data.draw(st.lists(st.integers(1, 200), unique=True, min_size=threshold, max_size=threshold + 8))
    liars = data.draw(st.lists(st.sampled_from(holders), unique=True, max_size=(len(holders) - threshold) // 2))
    secret = data.draw(NUMBERS)
    shares = split(secret, holders, threshold)
    told = shares | {liar: (shares[liar] + data.draw(st.integers(1, PRIME - 1))) % PRIME for liar in liars}
    assert corrected(told, threshold) == (secret, frozenset(liars))


def test_too_many_wrong_shares_are_not_taken_for_others() -> None:
    shares = split(7, range(1, 8), 5)
    wrong = shares | {one: secrets.randbelow(PRIME) for one in (1, 2)}
    assert corrected(wrong, 5) is None
    assert corrected(dict(list(shares.items())[:4]), 5) is None
