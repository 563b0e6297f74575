"""A secret in shares, of which any `threshold` give it back and fewer say nothing of it (Shamir 1979, CACM).

Secrets and shares are numbers below the prime 2^255 - 19. A holder's share is the value of a random polynomial at the holder's
number, which is 1 or more; the secret is the value at 0.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence

PRIME = 2**255 - 19
NUMBER_BYTES = 32


def split(secret: int, holders: Sequence[int], threshold: int, below: Callable[[int], int] = secrets.randbelow) -> dict[int, int]:
    """A share for each holder, by number. Raises ValueError: holders or threshold that no secret can be shared among."""
    if not 0 <= secret < PRIME:
        raise ValueError("the secret is no number below 2^255 - 19")
    _check_holders(holders)
    if not 1 <= threshold <= len(holders):
        raise ValueError(f"a threshold of {threshold} with {len(holders)} holders")
    coefficients = [*(below(PRIME) for _ in range(threshold - 1)), secret]  # highest power first
    return {holder: _value(coefficients, holder) for holder in holders}


class Recovery:
    """Gives secrets back from the shares of the same holders, as many as the threshold."""

    def __init__(self, holders: Sequence[int]) -> None:
        _check_holders(holders)
        self._weights = {holder: _weight(holder, holders) for holder in holders}

    def secret(self, shares: Mapping[int, int]) -> int:
        """The secret, if the shares are right: whoever knows something of it must check that. Needs each holder's share."""
        return sum(shares[holder] * weight for holder, weight in self._weights.items()) % PRIME


def corrected(shares: Mapping[int, int], threshold: int) -> tuple[int, frozenset[int]] | None:
    """The secret although some shares are wrong, and whose they are; None if more than half of those to spare are.

    Gao 2003, "A new algorithm for decoding Reed-Solomon codes": the polynomial through all points is the right one and a fraction
    with the wrong places for zeros, which the extended Euclidean algorithm finds.
    """
    holders, count = list(shares), len(shares)
    _check_holders(holders)
    if count < threshold:
        return None
    before, now = _product(holders), _through(shares)
    factor_before, factor = [0], [1]
    while 2 * (len(now) - 1) >= count + threshold:
        quotient, rest = _divided(before, now)
        before, now = now, rest
        factor_before, factor = factor, _minus(factor_before, _times(quotient, factor))
    polynomial, rest = _divided(now, factor)
    if rest != [0] or len(polynomial) > threshold:
        return None
    backwards = polynomial[::-1]
    return polynomial[0], frozenset(holder for holder in holders if _value(backwards, holder) != shares[holder] % PRIME)


# Polynomials as lists of coefficients modulo the prime, the lowest power first and the last not zero, but for [0]


def _trimmed(coefficients: list[int]) -> list[int]:
    while len(coefficients) > 1 and coefficients[-1] == 0:
        coefficients.pop()
    return coefficients


def _minus(one: list[int], other: list[int]) -> list[int]:
    longer = max(len(one), len(other))
    one, other = one + [0] * (longer - len(one)), other + [0] * (longer - len(other))
    return _trimmed([(a - b) % PRIME for a, b in zip(one, other, strict=True)])


def _times(one: list[int], other: list[int]) -> list[int]:
    result = [0] * (len(one) + len(other) - 1)
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            result[i + j] += a * b
    return _trimmed([value % PRIME for value in result])


def _divided(one: list[int], by: list[int]) -> tuple[list[int], list[int]]:
    """Quotient and rest."""
    rest, quotient = list(one), [0] * max(1, len(one) - len(by) + 1)
    inverse = pow(by[-1], -1, PRIME)
    for place in range(len(one) - len(by), -1, -1):
        quotient[place] = factor = rest[place + len(by) - 1] * inverse % PRIME
        for i, b in enumerate(by):
            rest[place + i] = (rest[place + i] - factor * b) % PRIME
    return _trimmed(quotient), _trimmed(rest[: len(by) - 1] or [0])


def _product(zeros: Sequence[int]) -> list[int]:
    """The polynomial with these zeros."""
    result = [1]
    for zero in zeros:
        result = [(low - zero * high) % PRIME for low, high in zip([0, *result], [*result, 0], strict=True)]
    return result


def _through(points: Mapping[int, int]) -> list[int]:
    """The polynomial of the least degree through these points (Newton's divided differences)."""
    at, values = list(points), list(points.values())
    for order in range(1, len(at)):
        for i in range(len(at) - 1, order - 1, -1):
            values[i] = (values[i] - values[i - 1]) * pow(at[i] - at[i - order], -1, PRIME) % PRIME
    result = [0]
    for place in range(len(at) - 1, -1, -1):
        result = [(low - at[place] * high) % PRIME for low, high in zip([0, *result], [*result, 0], strict=True)]
        result[0] = (result[0] + values[place]) % PRIME
    return _trimmed(result)


def _value(coefficients: Sequence[int], at: int) -> int:
    value = 0
    for coefficient in coefficients:
        value = (value * at + coefficient) % PRIME
    return value


def _weight(holder: int, holders: Sequence[int]) -> int:
    """Lagrange's, of a holder's share in the value at 0."""
    others = [other for other in holders if other != holder]
    above, below = math.prod(others), math.prod(other - holder for other in others)  # of small numbers: one reduction will do
    return above * pow(below, -1, PRIME) % PRIME


def _check_holders(holders: Sequence[int]) -> None:
    if len(set(holders)) != len(holders) or not all(1 <= holder < PRIME for holder in holders):
        raise ValueError("holders must have different numbers from 1 on")
