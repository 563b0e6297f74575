"""A few numbers beside the update – weights, losses, sums of features – in a ring so wide that neither range nor steps matter.

A number is an integer of 256 bits, in steps of 2^-116, modulo 2^256; an array `(n, 4)` of 64-bit words, the lowest first. So whole
numbers add up exactly, and of others a float64 is rounded by less than its own last place, whatever its magnitude from 2^-63 on.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Wide = NDArray[np.uint64]
Number = float | Fraction
BITS, FRACTION_BITS = 256, 116
LARGEST = 2.0**116
TERMS = 1 << 22  # of a sum, each at most LARGEST, so that it cannot reach half the ring
BYTES = BITS // 8
_WORDS = BITS // 64


def encode(values: Iterable[Number]) -> Wide:
    """The numbers as an array `(n, 4)`. Raises ValueError: one is beyond `LARGEST`, or undefined."""
    return np.frombuffer(b"".join(map(_bytes_of, values)), "<u8").astype(np.uint64).reshape(-1, _WORDS)


def decode(total: Wide) -> list[float]:
    """What a sum stands for, each rounded once to a float64."""
    return [_float_of(number) for number in integers(total)]


def integers(total: Wide) -> list[int]:
    """A sum in steps of 2^-`FRACTION_BITS`: exactly."""
    content = total.astype("<u8", copy=False).tobytes()
    return [int.from_bytes(content[at : at + BYTES], "little", signed=True) for at in range(0, len(content), BYTES)]


def add(total: Wide, more: Wide) -> None:
    """Add `more` to `total`, in place."""
    carry = np.zeros(len(total), dtype=np.uint64)
    for word in range(_WORDS):
        before = total[:, word] + carry
        total[:, word] = before + more[:, word]
        carry = ((before < carry) | (total[:, word] < before)).astype(np.uint64)


def subtract(total: Wide, less: Wide) -> None:
    """Subtract `less` from `total`, in place."""
    borrow = np.zeros(len(total), dtype=np.uint64)
    for word in range(_WORDS):
        before = total[:, word].copy()
        after = before - less[:, word]
        total[:, word] = after - borrow
        borrow = ((before < less[:, word]) | (after < borrow)).astype(np.uint64)


def _bytes_of(value: Number) -> bytes:
    if not -LARGEST <= value <= LARGEST:  # also of NaN
        raise ValueError(f"{float(value):g} is beyond {LARGEST:g}, the largest number that a secure sum takes")
    return round(Fraction(value) * (1 << FRACTION_BITS)).to_bytes(BYTES, "little", signed=True)


def _float_of(number: int) -> float:
    return number / (1 << FRACTION_BITS)  # Python divides integers with one rounding
