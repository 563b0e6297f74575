"""Means over clients of what each has measured, with noise: metrics, and the statistics of features. Each client counts alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from choral.metrics import Metric
from choral.privacy.noise import STEPS, Noise
from choral.privacy.told import Range, Vector, bounded, moments_behind_noise, scaled_metrics, scaled_moments, unscaled
from choral.statistics import Moments

from choral_server.rounds import Part


def noised_mean(vectors: Iterable[Vector], size: int, noise: float, expected: int, source: Noise) -> Vector:
    """The mean of vectors `(size,)` with entries in -1 to 1, over `expected` clients; noise of `noise` · √size on their sum.

    The sum is over integers in steps of which the noise has `STEPS`. What is beyond ±1 is cut off.
    """
    steps = STEPS / (noise * math.sqrt(size))
    total = np.zeros(size, dtype=np.int64)
    for vector in vectors:
        total += np.trunc(bounded(vector) * steps).astype(np.int64)  # never away from zero
    return (total + source(size)) / (steps * expected)


def noised_metrics(
    parts: Iterable[Part], ranges: Mapping[str, Range], noise: float, expected: int, source: Noise
) -> tuple[Metric, ...]:
    """What clients have measured: of each metric the mean of the clients' values, each within its range.

    Who has not measured counts as the middle of the range. `examples` says how many clients were expected.
    """
    names = tuple(ranges)

    def told(part: Part) -> Vector:
        return scaled_metrics({metric.name: metric.value for metric in part.held_out}, names, tuple(ranges.values()))

    means = noised_mean(map(told, parts), len(names), noise, expected, source)
    return tuple(Metric(name, unscaled(float(mean), ranges[name]), expected) for name, mean in zip(names, means, strict=True))


class PrivateStatistics:
    """Means and deviations of features whose `ranges` are known without looking at the data, with noise on them.

    Of each client the mean of a feature counts and the mean of its square, both scaled to -1 to 1. The noise is taken into account:
    the more of it, the nearer are the results to those of numbers that are spread evenly over the range.
    """

    def __init__(self, ranges: Sequence[Range], noise: float, expected: int, source: Noise) -> None:
        self._ranges = tuple(ranges)
        self._noise = noise
        self._expected = expected
        self._source = source
        self._parts: dict[str, Vector] = {}
        self._released: Moments | None = None

    def fold(self, part: Part, path: Path) -> None:
        """Add the statistics in the file at `path`, the accepted result of `part`."""
        self._parts[part.client] = scaled_moments(Moments.from_vector(np.fromfile(path, dtype="<f8")), self._ranges)

    def moments(self) -> Moments:
        """Of all clients together; the noise is drawn once."""
        self._released = self._released or self._noised()
        return self._released

    def _noised(self) -> Moments:
        size = 2 * len(self._ranges)
        found = noised_mean(self._parts.values(), size, self._noise, self._expected, self._source)
        return moments_behind_noise(found, self._ranges, size * (self._noise / self._expected) ** 2, self._expected)
