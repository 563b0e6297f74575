"""Real numbers as integers of a ring: what is masked, and what the sum of it means."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from choral.errors import ConfigError

RINGS = (32, 64)  # bits: what a machine adds in one step, modulo 2^bits
_MOST_FRACTION_BITS = {32: 24, 64: 46}  # beyond, a float32 has nothing to say
_LEAST_FRACTION_BITS = 8
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
        """The most by which a sum of `terms` numbers may be off, each rounded once."""
        return self.terms * 2.0 ** -(self.fraction_bits + 1)

    def encode(self, values: NDArray[np.floating[Any]], weight: float = 1.0) -> Ring:
        """rint(weight · value · 2^fraction_bits) of each; weight in (0, 1]. Raises ValueError: one is beyond `clip`, or NaN."""
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
    if not (math.isfinite(clip) and clip > 0):
        raise ConfigError(f"a clip of {clip:g}: it must be above 0")
    most = _most_bits(terms, clip, ring_bits)
    if most < _LEAST_FRACTION_BITS:
        raise ConfigError(
            f"{terms} clients with a clip of {clip:g} leave {most} bits behind the point of a {ring_bits}-bit sum, since "
            f"{terms} · {clip:g} · 2^bits must stay below 2^{ring_bits - 1}; at least {_LEAST_FRACTION_BITS} are needed: "
            f"lower the clip, ask fewer clients, or take 64 bits"
        )
    bits = min(most, _MOST_FRACTION_BITS[ring_bits]) if fraction_bits is None else fraction_bits
    if not _LEAST_FRACTION_BITS <= bits <= most:
        raise ConfigError(
            f"{bits} bits behind the point: with {terms} clients and a clip of {clip:g} it must be {_LEAST_FRACTION_BITS} to "
            f"{most}, since {terms} · {clip:g} · 2^bits must stay below 2^{ring_bits - 1}"
        )
    return FixedPoint(clip, bits, ring_bits, terms)


def _most_bits(terms: int, clip: float, ring_bits: int) -> int:
    """The most for which `terms` · (clip · 2^bits + ½) stays below half the ring."""
    each = (2 ** (ring_bits - 1) - 1) / terms - 0.5
    return math.floor(math.log2(each / clip)) if each > 0 else -1
