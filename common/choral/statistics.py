"""Federated statistics: moments of data that nobody sees together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from choral.errors import InvalidMessage

Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, means `(d,)` and sums of squared deviations M2 `(d,)` of d features."""

    count: float
    mean: Vector
    m2: Vector

    @classmethod
    def of(cls, examples: NDArray[np.floating]) -> Moments:
        """The moments of examples `(n, d)`, n ≥ 1."""
        x = examples.astype(np.float64)
        mean = x.mean(axis=0)
        return cls(float(len(x)), mean, np.square(x - mean).sum(axis=0))

    @property
    def deviation(self) -> Vector:
        """Standard deviation `(d,)` of the population; 1 where a feature is constant, so that dividing by it is safe.

        Constant to float32, in which the model computes: what is left of 0.1 minus the mean of many 0.1 is rounding, not spread.
        """
        deviation = np.sqrt(self.m2 / self.count)
        float32 = np.finfo(np.float32)
        least = np.maximum(float32.eps * np.abs(self.mean), float32.tiny)
        return np.where(deviation > least, deviation, 1.0)

    def to_vector(self) -> Vector:
        """`(1 + 2d,)`: count, means, M2."""
        return np.concatenate([[self.count], self.mean, self.m2])

    @classmethod
    def from_vector(cls, vector: Vector) -> Moments:
        """The inverse of `to_vector`. Raises InvalidMessage: wrong length, not finite, no examples, or a negative M2."""
        if vector.size < 3 or vector.size % 2 == 0:
            raise InvalidMessage(f"statistics of {vector.size} numbers; 1 + 2 × features are expected")
        if not np.isfinite(vector).all() or vector[0] < 1:
            raise InvalidMessage(f"statistics that are not finite, or of {vector[0]} examples; at least one is needed")
        features = vector.size // 2
        if (vector[1 + features :] < 0).any():
            raise InvalidMessage("statistics with a negative sum of squares")
        return cls(float(vector[0]), vector[1 : 1 + features], vector[1 + features :])


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of both sets together (Chan, Golub & LeVeque 1979, eq. 2.1)."""
    count = a.count + b.count
    delta = b.mean - a.mean
    mean = a.mean + delta * (b.count / count)
    return Moments(count, mean, a.m2 + b.m2 + np.square(delta) * (a.count * b.count / count))


def merge_all(parts: Iterable[Moments]) -> Moments:
    """The moments of all parts together, merged in the order given."""
    return reduce(merge, parts)
