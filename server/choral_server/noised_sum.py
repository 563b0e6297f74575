"""What comes of a round whose clients have put the noise on themselves: a masked sum, or statistics that each sent as they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from choral.metrics import Metric
from choral.plan import Kind, Plan
from choral.privacy.told import Range, Told, moments_behind_noise, unscaled
from choral.secagg import wide
from choral.secagg.fixed_point import FixedPoint
from choral.secagg.masks import Mask
from choral.secagg.summand import CLIENTS, Layout
from choral.statistics import Moments
from numpy.typing import NDArray

from choral_server.masked_sum import BadSum
from choral_server.rounds import Part

_BLOCK = 1 << 18  # elements
_SURELY = 12.0  # deviations of a norm, or of one element: noise is never so large


class NoisedSum:
    """Σ of vectors `told`, each with its part of the noise, laid out as `layout` and scaled by `scale`; over `expected` clients.

    `metrics` are those that clients measure.
    """

    def __init__(self, layout: Layout, scale: FixedPoint, told: Told, plan: Plan, metrics: Sequence[str], expected: int) -> None:
        assert plan.private is not None, "there is noise on it"
        self._scale = scale
        self._told = told
        self._terms = plan.private
        self._kind = plan.kind
        self._metrics = metrics
        self._expected = expected
        self._sum = layout.zero()
        self.contained: frozenset[str] = frozenset()

    def fold(self, part: Part, path: Path) -> None:
        """Add the masked result in the file at `path`, the accepted one of `part`."""
        self._sum.add_file(path)
        self.contained |= {part.assignment}

    def unmask(self, mask: Mask) -> None:
        """Take the masks off; from then on it can be read. Raises BadSum: some client has sent something else than it should."""
        self._sum.add_mask(mask)
        clients, counted = len(self.contained), wide.decode(self._sum.numbers)
        if counted != [float(clients)]:
            raise BadSum(f"the sum of {CLIENTS!r} is {counted[0]:g} where {clients} can be: {_WHY}")
        self._check_length(clients)

    def mean(self, start: int = 0, stop: int | None = None) -> NDArray[np.float64]:
        """The noised sum over the clients expected: of the elements from `start` to `stop`, or of all of the update `(size,)`."""
        return self._decoded(start, self._told.update if stop is None else stop) / self._expected

    def moments(self) -> Moments:
        """Of all clients together, of which each counts alike."""
        found = self._decoded(0, self._told.beside) / self._expected
        return moments_behind_noise(found, self._terms.ranges, self._variance / self._expected**2, self._expected)

    def held_out(self) -> tuple[Metric, ...]:
        """What the clients measured, as means over those expected."""
        if self._kind is Kind.STATISTICS or not self._told.beside:
            return ()
        start = self._told.update
        means = self._decoded(start, start + self._told.beside) / (self._expected * self._told.unit)
        each = zip(self._metrics, means, self._terms.ranges, strict=True)
        return tuple(Metric(name, unscaled(float(mean), within), self._expected) for name, mean, within in each)

    @property
    def clipped(self) -> int:
        """How many clients had to shorten their update: nobody sees that."""
        return 0

    @property
    def within(self) -> float | None:
        """The noised share of updates that were no longer than the clip; None: it is not told."""
        if not self._told.clip_unit:
            return None
        last = self._told.size - 1
        return self._told.shortened(float(self._decoded(last, last + 1)[0]) / self._expected)

    @property
    def _variance(self) -> float:
        """Of the noise on each element of the sum: more than was asked for, if more clients are in it than had to be."""
        return self._told.deviation**2 * len(self.contained) / self._terms.clients

    def _decoded(self, start: int, stop: int) -> NDArray[np.float64]:
        return self._scale.decode(self._sum.vector[start:stop])

    def _check_length(self, clients: int) -> None:
        size, square = self._told.size, 0.0
        for start in range(0, size, _BLOCK):
            block = self._decoded(start, min(size, start + _BLOCK))
            square += float(np.dot(block, block))
        longest = clients * self._told.reach + math.sqrt(self._variance) * (math.sqrt(size) + _SURELY)
        if square > longest**2:
            raise BadSum(f"the sum has a norm of {math.sqrt(square):g} where at most {longest:g} can be: {_WHY}")


class NoisedStatistics:
    """Features' means and squares as `scaled_moments` gives them, each client's with noise of this `deviation`."""

    def __init__(self, ranges: Sequence[Range], deviation: float) -> None:
        self._ranges = ranges
        self._deviation = deviation
        self._parts: dict[str, NDArray[np.float64]] = {}

    def fold(self, part: Part, path: Path) -> None:
        """Add the statistics in the file at `path`, the accepted result of `part`."""
        self._parts[part.client] = np.fromfile(path, dtype="<f8")[1:]  # the first says of how many clients: of one

    def moments(self) -> Moments:
        """Of all clients together; in the order of their names, so that the order of arrival changes no bit."""
        found = np.mean([self._parts[client] for client in sorted(self._parts)], axis=0)
        return moments_behind_noise(found, self._ranges, self._deviation**2 / len(self._parts), len(self._parts))


_WHY = "some client has sent something else than it should, and nobody can see which"
