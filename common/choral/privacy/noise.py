"""Gaussian noise as whole numbers, from a cryptographic generator, which is never repeated: neither seeded nor kept.

What is noised are integers on a grid that is so fine that the standard deviation is `STEPS` of its steps. So no noise betrays by
its last bits what it was added to (Mironov 2012, CCS): the sum of integers and a rounded normal is the rounding of their sum.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

STEPS = 1 << 24
"""the standard deviation, in steps of the grid"""
Integers = NDArray[np.int64]
Noise = Callable[[int], Integers]
"""so many integers of standard deviation `STEPS`"""
_KEY_BYTES, _BLOCK_BYTES = 32, 16
_UNIT = 2.0**-53


class Bits:
    """Uniform random words: AES-256 in counter mode, under a key that the operating system gives."""

    def __init__(self) -> None:
        self._stream = Cipher(algorithms.AES(os.urandom(_KEY_BYTES)), modes.CTR(bytes(_BLOCK_BYTES))).encryptor()

    def words(self, count: int) -> NDArray[np.uint64]:
        """So many words of 64 bits."""
        return np.frombuffer(self._stream.update(bytes(8 * count)), dtype=np.uint64)

    def below(self, limit: int, count: int) -> NDArray[np.uint64]:
        """So many integers from 0 to `limit` - 1, each equally likely; `limit` is less than 2^63."""
        drawn, most = self.words(count), (1 << 64) // limit * limit
        if most < 1 << 64:
            while (refused := np.flatnonzero(drawn >= np.uint64(most))).size:
                drawn = drawn.copy()
                drawn[refused] = self.words(refused.size)
        return drawn % np.uint64(limit)


def gaussian() -> Noise:
    """Normal numbers (Box & Muller 1958), to the next integer; beyond 8.5 standard deviations there are none."""
    bits = Bits()

    def draw(count: int) -> Integers:
        pairs = (count + 1) // 2
        uniform = ((bits.words(2 * pairs) >> np.uint64(11)).astype(np.float64) + 1.0) * _UNIT  # above 0, 1 at the most
        radius, angle = np.sqrt(-2.0 * np.log(uniform[:pairs])), 2.0 * np.pi * uniform[pairs:]
        both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
        whole: Integers = np.rint(both * STEPS).astype(np.int64)
        return whole

    return draw


def discrete_gaussian() -> Noise:
    """Exactly the discrete Gaussian: no floating point is involved (Canonne, Kamath & Steinke 2020, NeurIPS, algorithms 1 to 3)."""
    bits = Bits()

    def draw(count: int) -> Integers:
        found, drawn = np.empty(count, dtype=np.int64), 0
        while drawn < count:
            some = _accepted(bits, _laplace(bits, 2 * (count - drawn) + 64))[: count - drawn]
            found[drawn : drawn + some.size] = some
            drawn += some.size
        return found

    return draw


def _accepted(bits: Bits, candidates: Integers) -> Integers:
    """Of discrete Laplace numbers of scale σ those that stay, with probability exp(-(|y| - σ)² / 2σ²)."""
    away, per = np.square(np.abs(candidates) - STEPS).astype(np.uint64), 2 * STEPS**2
    whole, rest = np.divmod(away, np.uint64(per))
    stays = _exp(bits, rest, per)
    for times in range(1, int(whole.max(initial=0)) + 1):
        again = np.flatnonzero(stays & (whole >= times))
        stays[again] = _exp(bits, np.full(again.size, 1, np.uint64), 1)
    return candidates[stays]


def _laplace(bits: Bits, count: int) -> Integers:
    """Discrete Laplace numbers of scale σ, somewhat fewer than `count`."""
    low = bits.below(STEPS, count)
    low = low[_exp(bits, low, STEPS)]
    high, going = np.zeros(low.size, dtype=np.uint64), np.arange(low.size)
    while going.size:
        going = going[_exp(bits, np.full(going.size, 1, np.uint64), 1)]
        high[going] += np.uint64(1)
    size = (low + high * np.uint64(STEPS)).astype(np.int64)
    negative = (bits.words(size.size) & np.uint64(1)).astype(bool)
    there = ~(negative & (size == 0))  # zero has one sign
    found: Integers = np.where(negative, -size, size)[there]
    return found


def _exp(bits: Bits, numerators: NDArray[np.uint64], denominator: int) -> NDArray[np.bool_]:
    """True with probability exp(-numerator / denominator) each; numerator ≤ denominator."""
    counts, going, k = np.ones(numerators.size, dtype=np.int64), np.arange(numerators.size), 1
    while going.size:
        going = going[bits.below(denominator * k, going.size) < numerators[going]]
        counts[going] += 1
        k += 1
    odd: NDArray[Any] = counts % 2 == 1
    return odd
