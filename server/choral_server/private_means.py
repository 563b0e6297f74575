"""Means over clients of what each has measured, with noise: metrics, and the statistics of features. Each client counts alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from choral.metrics import Metric
from choral.privacy.noise import STEPS, Noise
from choral.statistics import Moments
from numpy.typing import NDArray

from choral_server.rounds import Part

Vector = NDArray[np.float64]
Range = tuple[float, float]
_LEAST_DEVIATION = 0.05  # of half a range: less than that would blow up what is rare
_UNIFORM_SQUARE, _UNIFORM_SQUARE_VARIANCE = 1 / 3, 4 / 45  # of a uniform number in -1 to 1: mean and variance of its square


def noised_mean(vectors: Iterable[Vector], size: int, noise: float, expected: int, source: Noise) -> Vector:
    """The mean of vectors `(size,)` with entries in -1 to 1, over `expected` clients; noise of `noise` · √size on their sum.

    The sum is over integers in steps of which the noise has `STEPS`. What is beyond ±1 is cut off.
    """
    steps = STEPS / (noise * math.sqrt(size))
    total = np.zeros(size, dtype=np.int64)
    for vector in vectors:
        total += np.trunc(np.clip(np.nan_to_num(vector), -1.0, 1.0) * steps).astype(np.int64)  # never away from zero
    return (total + source(size)) / (steps * expected)


def noised_metrics(
    parts: Iterable[Part], ranges: Mapping[str, Range], noise: float, expected: int, source: Noise
) -> tuple[Metric, ...]:
    """What clients have measured: of each metric the mean of the clients' values, each within its range.

    Who has not measured counts as the middle of the range. `examples` says how many clients were expected.
    """
    names = tuple(ranges)

    def told(part: Part) -> Vector:
        values = {metric.name: metric.value for metric in part.held_out}
        return np.array([_scaled(values[name], ranges[name]) if name in values else 0.0 for name in names])

    means = noised_mean(map(told, parts), len(names), noise, expected, source)
    return tuple(
        Metric(name, _unscaled(float(np.clip(mean, -1, 1)), ranges[name]), expected)
        for name, mean in zip(names, means, strict=True)
    )


class PrivateStatistics:
    """Means and deviations of features whose `ranges` are known without looking at the data, with noise on them.

    Of each client the mean of a feature counts and the mean of its square, both scaled to -1 to 1. The noise is taken into account:
    the more of it, the nearer are the results to those of numbers that are spread evenly over the range.
    """

    def __init__(self, ranges: Sequence[Range], noise: float, expected: int, source: Noise) -> None:
        self._ranges = np.array(ranges, dtype=np.float64).reshape(-1, 2)
        self._noise = noise
        self._expected = expected
        self._source = source
        self._parts: dict[str, Vector] = {}
        self._released: Moments | None = None

    def fold(self, part: Part, path: Path) -> None:
        """Add the statistics in the file at `path`, the accepted result of `part`."""
        moments = Moments.from_vector(np.fromfile(path, dtype="<f8"))
        middle, half = self._scale
        mean = (moments.mean - middle) / half
        square = moments.m2 / moments.count / half**2 + np.square(mean)
        self._parts[part.client] = np.concatenate([mean, 2 * square - 1])

    def moments(self) -> Moments:
        """Of all clients together; the noise is drawn once."""
        self._released = self._released or self._noised()
        return self._released

    def _noised(self) -> Moments:
        size = 2 * len(self._ranges)
        found = noised_mean(self._parts.values(), size, self._noise, self._expected, self._source)
        variance = size * (self._noise / self._expected) ** 2
        mean = found[: size // 2] * _kept(_UNIFORM_SQUARE, variance)
        square = _UNIFORM_SQUARE + ((found[size // 2 :] + 1) / 2 - _UNIFORM_SQUARE) * _kept(_UNIFORM_SQUARE_VARIANCE, variance / 4)
        mean = np.clip(mean, -1, 1)
        deviation = np.sqrt(np.maximum(square - np.square(mean), _LEAST_DEVIATION**2))
        middle, half = self._scale
        return Moments(float(self._expected), middle + half * mean, self._expected * np.square(half * deviation))

    @property
    def _scale(self) -> tuple[Vector, Vector]:
        least, most = self._ranges.T
        return (least + most) / 2, (most - least) / 2


def _kept(prior: float, noise: float) -> float:
    """By what to multiply a number that was found with noise of this variance and was expected to vary by `prior`."""
    return prior / (prior + noise)


def _scaled(value: float, within: Range) -> float:
    least, most = within
    return 2 * (value - least) / (most - least) - 1


def _unscaled(value: float, within: Range) -> float:
    least, most = within
    return least + (value + 1) / 2 * (most - least)
