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
