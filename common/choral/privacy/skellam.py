"""Skellam noise: whole numbers whose sum over several clients is Skellam again, so each adds a part of what the sum needs.

The difference of two Poisson variables of the same rate (Skellam 1946). For a sum that one client moves by at most Δ in the
Euclidean norm, noise of variance μ costs at every integer order α no more than a Gaussian of variance μ / (1 + 4/μ) does: of
theorem 3.5 of Agarwal, Kairouz & Liu 2021 (NeurIPS) with Δ₁ ≤ Δ₂², which holds for whole numbers.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from choral.privacy.noise import Bits, Integers

LEAST_RATE = 64.0
"""of the Poisson variables: below, the sampler would have to be another"""
LEAST_VARIANCE = 2.0**20
"""of the noise in a sum, in steps: less would cost noticeably more than a Gaussian"""
_LARGEST_RATE = 2.0**60
_UNIT = 2.0**-53
_SERIES_BELOW = 0.01
Floats = NDArray[np.float64]


def as_gaussian(noise: float) -> float:
    """The `noise` of a Gaussian that costs no less, at every integer order, than Skellam noise of `LEAST_VARIANCE` or more."""
    return noise / math.sqrt(1 + 4 / LEAST_VARIANCE)


class Skellam:
    """Skellam noise of this `variance`, from a cryptographic generator. Raises ValueError: it is too small, or too large."""

    def __init__(self, variance: float) -> None:
        if not LEAST_RATE <= variance / 2 <= _LARGEST_RATE:
            raise ValueError(f"Skellam noise of variance {variance:g}: it must be {2 * LEAST_RATE:g} to {2 * _LARGEST_RATE:.1e}")
        self._rate = variance / 2
        self._bits = Bits()

    def __call__(self, count: int) -> Integers:
        """So many of them."""
        both = self._poisson(2 * count)
        return both[:count] - both[count:]

    def _poisson(self, count: int) -> Integers:
        """So many Poisson variables, less the whole part of their rate, which falls out of a difference."""
        found = np.empty(count, dtype=np.int64)
        left = np.arange(count)
        while left.size:
            drawn, accepted = self._proposed(left.size)
            found[left[accepted]] = drawn[accepted]
            left = left[~accepted]
        return found

    def _proposed(self, count: int) -> tuple[Integers, NDArray[np.bool_]]:
        """Candidates, and which of them stay: transformed rejection (Hörmann 1993, algorithm PTRS)."""
        rate, whole = self._rate, math.floor(self._rate)
        b = 0.931 + 2.53 * math.sqrt(rate)
        a = -0.059 + 0.02483 * b
        inverse_alpha = 1.1239 + 1.1328 / (b - 3.4)
        surely = 0.9277 - 3.6224 / (b - 2)
        u, v = self._uniform(count) - 0.5, self._uniform(count)
        edge = 0.5 - np.abs(u)
        with np.errstate(divide="ignore", invalid="ignore"):  # at the very edge, which is refused
            drawn = np.floor((2 * a / edge + b) * u + (rate - whole) + 0.43)
            stays = (edge >= 0.07) & (v <= surely)
            undecided = np.flatnonzero(~stays & (drawn >= -whole) & ~((edge < 0.013) & (v > edge)) & (edge > 0))
            height = np.log(v[undecided] * inverse_alpha / (a / np.square(edge[undecided]) + b))
            stays[undecided] = height <= _log_poisson(drawn[undecided] - (rate - whole), rate)
            return np.where(stays, drawn, 0).astype(np.int64), stays

    def _uniform(self, count: int) -> Floats:
        """Above 0, and 1 at the most."""
        return ((self._bits.words(count) >> np.uint64(11)).astype(np.float64) + 1.0) * _UNIT


def _log_poisson(away: Floats, rate: float) -> Floats:
    """Log P(k) of k = rate + `away`, accurate where log Γ itself would have lost all its digits (Stirling, with two terms)."""
    k = np.maximum(rate + away, 1.0)
    by = away / rate
    near = by**2 * (1 / 2 - by * (1 / 6 - by * (1 / 12 - by * (1 / 20 - by * (1 / 30 - by / 42)))))
    far = (1 + by) * np.log1p(np.maximum(by, -1 + _UNIT)) - by
    bend = np.where(np.abs(by) < _SERIES_BELOW, near, far)
    logs: Floats = -rate * bend - 0.5 * np.log(2 * np.pi * k) - 1 / (12 * k) + 1 / (360 * k**3)
    return logs
