"""Real numbers as integers of a ring: what is masked, and what the sum of it means."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from choral.errors import ConfigError

RINGS = (32, 64)  # bits: what a machine adds in one step, modulo 2^bits
_STEPS_BITS = {32: 31, 64: 52}  # of the clip: what the ring holds, and what a float64 does
_LEAST_STEPS_BITS = 8
_SMALLEST_CLIP, _LARGEST_CLIP = 2.0**-30, 2.0**30
Ring = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, slots=True)
class FixedPoint:
    """Numbers of magnitude at most `clip` in steps of 2^-`fraction_bits`, as integers modulo 2^`ring_bits`.

    The sum of at most `terms` of them is right: it cannot reach half the ring.
    """

    clip: float
    fraction_bits: int
    ring_bits: int
    terms: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the integers, little-endian."""
        return np.dtype(f"<u{self.ring_bits // 8}")

    @property
    def error(self) -> float:
        """The most by which a sum of `terms` numbers may be off, each rounded once; and a float64 rounds it once more."""
        return self.terms * 2.0 ** -(self.fraction_bits + 1)

    @property
    def clip32(self) -> np.float32:
        """The largest float32 that is not beyond `clip`."""
        near = np.float32(self.clip)
        return near if float(near) <= self.clip else np.nextafter(near, np.float32(0))

    def encode(self, values: NDArray[np.floating[Any]], weight: float = 1.0) -> Ring:
        """rint(weight · value · 2^fraction_bits) of each; weight in (0, 1]. Raises ValueError: one is beyond `clip`, or NaN."""
        if not 0 < weight <= 1:
            raise ValueError(f"a weight of {weight:g}: it must be above 0, and 1 at most")
        largest = float(np.abs(values).max(initial=0.0))
        if not largest <= self.clip:  # also of NaN
            raise ValueError(f"{largest:g} is beyond the clip of {self.clip:g}")
        scaled = np.multiply(values, weight * 2.0**self.fraction_bits, dtype=np.float64)
        np.rint(scaled, out=scaled)
        whole: Ring = scaled.astype(f"<i{self.ring_bits // 8}").view(self.dtype)
        return whole

    def decode(self, total: Ring) -> NDArray[np.float64]:
        """What a sum of at most `terms` encoded numbers stands for."""
        signed: NDArray[np.signedinteger[Any]] = total.view(f"<i{self.ring_bits // 8}")
        values: NDArray[np.float64] = np.multiply(signed, 2.0**-self.fraction_bits, dtype=np.float64)
        return values


def fixed_point(terms: int, clip: float, ring_bits: int = 32, fraction_bits: int | None = None) -> FixedPoint:
    """The finest steps for so many terms, or those asked for. Raises ConfigError: the sum could overflow, or would say nothing."""
    if ring_bits not in RINGS:
        raise ConfigError(f"a ring of {ring_bits} bits: it must be one of {', '.join(map(str, RINGS))}")
    if terms < 1:
        raise ConfigError(f"a sum of {terms} clients: it must have one at the least")
    if not _SMALLEST_CLIP <= clip <= _LARGEST_CLIP:
        raise ConfigError(f"a clip of {clip:g}: it must be {_SMALLEST_CLIP:.0e} to {_LARGEST_CLIP:.0e}")
    below = 1 - math.frexp(clip)[1]  # the bits behind the point with which the clip is 1 to 2
    most = min(_most_bits(terms, clip, ring_bits), _STEPS_BITS[ring_bits] + below)
    least = _LEAST_STEPS_BITS + below
    if most < least:
        raise ConfigError(
            f"{terms} clients with a clip of {clip:g} leave {most} bits behind the point of a {ring_bits}-bit sum, since "
            f"{terms} · {clip:g} · 2^bits must stay below 2^{ring_bits - 1}; at least {least} are needed: "
            f"lower the clip, ask fewer clients, or take 64 bits"
        )
    bits = most if fraction_bits is None else fraction_bits
    if not least <= bits <= most:
        raise ConfigError(
            f"{bits} bits behind the point: with {terms} clients and a clip of {clip:g} it must be {least} to {most}, "
            f"since {terms} · {clip:g} · 2^bits must stay below 2^{ring_bits - 1}, and more than {_STEPS_BITS[ring_bits]} bits of "
            f"the clip say nothing"
        )
    return FixedPoint(clip, bits, ring_bits, terms)


def _most_bits(terms: int, clip: float, ring_bits: int) -> int:
    """The most for which `terms` · (clip · 2^bits + ½) stays below half the ring; exactly."""
    each = (Fraction(2 ** (ring_bits - 1) - 1, terms) - Fraction(1, 2)) / Fraction(clip)
    bits = ring_bits + 64
    while bits > -64 and Fraction(2) ** bits > each:
        bits -= 1
    return bits
