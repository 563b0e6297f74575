"""What a client tells under privacy, as one vector: its update, and numbers beside it, all under noise of the same size.

Numbers beside the update are means of features or metrics, scaled from their range to -1 to 1, and whether the update was
shortened. Each is multiplied so that the noise, which is the same on every element, is as large beside it as its share of the
privacy says. The vector's Euclidean norm is bounded; so adding the client moves the sum by no more than that, and another vector in
its place by no more than twice that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from choral.errors import ConfigError
from choral.plan import Kind, Plan, PrivatePlan
from choral.privacy.skellam import LEAST_VARIANCE
from choral.secagg.fixed_point import FixedPoint, fixed_point
from choral.statistics import Moments

Vector = NDArray[np.float64]
Range = tuple[float, float]
_LEAST_DEVIATION = 0.05  # of half a range: less than that would blow up what is rare
_UNIFORM_SQUARE, _UNIFORM_SQUARE_VARIANCE = 1 / 3, 4 / 45  # of a uniform number in -1 to 1: mean and variance of its square
SHORTER = 1 - 2.0**-20
"""by what a norm computed in float64 may be too small"""
_FINEST_BITS = 28
_TAIL = 12.0  # deviations: beyond, noise falls once in 10^32 elements


@dataclass(frozen=True, slots=True)
class Told:
    """A vector of `update` elements, no longer than `clip`, then `beside` numbers; and one for the clip, if that has a unit.

    `deviation` is that of the noise on each element, of all who share in it together.
    """

    update: int
    beside: int
    clip: float
    deviation: float
    unit: float = 1.0
    """what a 1 of the numbers beside the update is multiplied by"""
    clip_unit: float = 0.0
    """the same of whether the update was shortened, 1 or -1; 0: that is not told"""

    @property
    def size(self) -> int:
        """Elements in all."""
        return self.update + self.beside + (self.clip_unit > 0)

    @property
    def reach(self) -> float:
        """The Euclidean norm that the whole vector has at most."""
        update = self.clip if self.update else 0.0
        return math.sqrt(update**2 + self.beside * self.unit**2 + self.clip_unit**2)

    def largest(self, most_clients: int, clients: int) -> float:
        """How large an element of a sum of so many may be for each of them, when `clients` together have noise of `deviation`."""
        return self.reach + _TAIL * self.deviation / math.sqrt(most_clients * clients)

    def too_coarse(self, steps: float) -> str | None:
        """Why so many steps to 1 are too few; None: they are enough."""
        if (self.deviation * steps) ** 2 < LEAST_VARIANCE:
            return f"noise of deviation {self.deviation:g} is {self.deviation * steps:.3g} steps: at least 1024 are needed"
        if self.update and self.longest(steps) <= self.clip / 2:
            return f"rounding moves {self.update} elements by more than half the clip of {self.clip:g}: fewer clients, or 64 bits"
        return None

    def longest(self, steps: float) -> float:
        """The norm to which an update is shortened, so that rounding to so many steps to 1 leaves it within the clip."""
        return (self.clip - math.sqrt(self.update) / 2 / steps) * SHORTER

    def shortened(self, within: float) -> float:
        """The share of updates that were no longer than the clip, of the mean of that element over the clients expected."""
        return 0.5 + within / (2 * self.clip_unit)


def told_by(plan: Plan, size: int) -> Told:
    """What the clients of a private plan tell, of a model of `size` averaged elements. Raises ConfigError: it makes no sense."""
    assert plan.private is not None, "only then"
    return told_of(plan.kind, plan.private, size, masked=plan.secure is not None)


def told_of(kind: Kind, terms: PrivatePlan, size: int, *, masked: bool) -> Told:
    """The same of a round of this kind, whose results are masked or not."""
    move = 1.0 if masked else 2.0  # what is sent is one client's, in place of anything else that it could send
    total, count = terms.noise * move, len(terms.ranges)
    if kind is not Kind.TRAINING:
        beside = 2 * count if kind is Kind.STATISTICS else count
        if not beside:
            raise ConfigError(f"a private round of {kind.value} has no ranges of what is told")
        return Told(0, beside, terms.clip, total * math.sqrt(beside))
    if bool(count) != (terms.metrics_share > 0):
        raise ConfigError(f"a private round has {count} metrics, and a share of {terms.metrics_share:g} of its privacy for them")
    if terms.clip_share and not masked:
        raise ConfigError("how many updates were shortened is told in a sum only")
    deviation = total / math.sqrt(1 - terms.clip_share - terms.metrics_share) * terms.clip
    unit = deviation * math.sqrt(terms.metrics_share / count) / total if count else 1.0
    return Told(size, count, terms.clip, deviation, unit, deviation * math.sqrt(terms.clip_share) / total)


def scale_for(told: Told, most_clients: int, clients: int, ring_bits: int) -> FixedPoint:
    """The finest steps for a sum of so many vectors, if `clients` have all the noise, of which a deviation has 2^28 at the most.

    Raises ConfigError: they are too coarse.
    """
    largest = told.largest(most_clients, clients)
    scale = fixed_point(most_clients, largest, ring_bits)
    bits = min(scale.fraction_bits, math.floor(_FINEST_BITS - math.log2(told.deviation)))
    scale = fixed_point(most_clients, largest, ring_bits, bits)
    if (reason := told.too_coarse(2.0**scale.fraction_bits)) is not None:
        raise ConfigError(reason)
    return scale


def scaled(value: float, within: Range) -> float:
    """A number as a share of its range: -1 at the least, 1 at the most."""
    least, most = within
    return 2 * (value - least) / (most - least) - 1


def unclipped(value: float, within: Range) -> float:
    """The inverse of `scaled`."""
    least, most = within
    return least + (value + 1) / 2 * (most - least)


def unscaled(value: float, within: Range) -> float:
    """The same, cut to the range."""
    return unclipped(min(1.0, max(-1.0, value)), within)


def scaled_metrics(values: Mapping[str, float], names: Sequence[str], ranges: Sequence[Range]) -> Vector:
    """What was measured, each number as a share of its range; what was not counts as the middle of it."""
    return bounded([scaled(values[name], within) if name in values else 0.0 for name, within in zip(names, ranges, strict=True)])


def scaled_moments(moments: Moments, ranges: Sequence[Range]) -> Vector:
    """The means of features as shares of their ranges, and 2s - 1 of the means s of their squares: `(2d,)`, or `(n, 2d)` of n."""
    middle, half = _scale(ranges)
    mean = (moments.mean - middle) / half
    square = moments.m2 / moments.count / half**2 + np.square(mean)
    return bounded(np.concatenate([mean, 2 * square - 1], axis=-1))


def bounded(values: Sequence[float] | Vector) -> Vector:
    """Cut to -1 to 1, and 0 where a number is undefined."""
    return np.clip(np.nan_to_num(np.asarray(values, dtype=np.float64)), -1.0, 1.0)


def moments_behind_noise(found: Vector, ranges: Sequence[Range], variance: float, count: int) -> Moments:
    """Means and deviations of features from what `scaled_moments` gives, with noise of this `variance` on each number.

    The noise is taken into account: the more of it, the nearer are the results to those of numbers that are spread evenly.
    """
    size = len(found)
    mean = found[: size // 2] * _kept(_UNIFORM_SQUARE, variance)
    square = _UNIFORM_SQUARE + ((found[size // 2 :] + 1) / 2 - _UNIFORM_SQUARE) * _kept(_UNIFORM_SQUARE_VARIANCE, variance / 4)
    mean = np.clip(mean, -1, 1)
    deviation = np.sqrt(np.maximum(square - np.square(mean), _LEAST_DEVIATION**2))
    middle, half = _scale(ranges)
    return Moments(float(count), middle + half * mean, count * np.square(half * deviation))


def _scale(ranges: Sequence[Range]) -> tuple[Vector, Vector]:
    least, most = np.array(ranges, dtype=np.float64).reshape(-1, 2).T
    return (least + most) / 2, (most - least) / 2


def _kept(prior: float, noise: float) -> float:
    """By what to multiply a number that was found with noise of this variance and was expected to vary by `prior`."""
    return prior / (prior + noise)
