"""What this client adds to a secure sum: its update, weighted and rounded, and what it has measured, as numbers.

Bounds are kept here, because the coordinator never sees what it could hold against them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction

import numpy as np
import structlog
from choral.codecs import Vector
from choral.errors import ConfigError, Declined
from choral.metrics import Metric
from choral.plan import SecurePlan
from choral.secagg import summand
from choral.secagg.fixed_point import FixedPoint, fixed_point
from choral.secagg.summand import Layout, Summand
from choral.secagg.wide import Number
from choral.statistics import Moments
from numpy.typing import NDArray

log = structlog.get_logger()
Blocks = Callable[[], Iterator[Vector]]
"""The update, block by block, as often as it is asked for."""


def check_terms(secure: SecurePlan) -> None:
    """Raises Declined: no sum can be made on these terms."""
    scale_of(secure)
    if not (secure.weight_cap >= 1 and secure.max_norm >= 0):
        told = f"a weight cap of {secure.weight_cap} and a norm of {secure.max_norm:g}"
        raise Declined(f"the coordinator asks for a sum that cannot be right: {told}")


def scale_of(secure: SecurePlan) -> FixedPoint:
    """How entries are rounded. Raises Declined: a sum could overflow."""
    try:
        return fixed_point(secure.most_clients, secure.clip, secure.ring_bits, secure.fraction_bits)
    except ConfigError as error:
        raise Declined(f"the coordinator asks for a sum that cannot be right: {error}") from error


def of_update(blocks: Blocks, layout: Layout, secure: SecurePlan, examples: int, held_out: tuple[Metric, ...]) -> Summand:
    """An update of `layout.size` elements and its weight, with what was measured. Raises Declined."""
    scale, shrink = scale_of(secure), _shrink(blocks, secure.max_norm)
    weight, vector = min(examples, secure.weight_cap), np.empty(layout.size, layout.dtype)
    start, clipped, clip = 0, 0, scale.clip32
    for block in blocks():
        if not np.isfinite(block).all():
            raise Declined("the update holds an infinite or undefined number: lower the learning rate, or look at this data")
        if shrink < 1:
            block = block * np.float32(shrink)
        within = np.clip(block, -clip, clip)
        clipped += int(np.count_nonzero(within != block))
        vector[start : start + block.size] = scale.encode(within, weight / secure.weight_cap)
        start += block.size
    if clipped:
        log.warning("update clipped", entries=clipped, of=layout.size, clip=secure.clip)
    values: dict[str, Number] = {summand.CLIENTS: 1, summand.WEIGHT: weight, summand.CLIPPED: int(clipped > 0 or shrink < 1)}
    return Summand(vector, _numbers(layout, values | summand.measured(held_out, secure.weight_cap)))


def of_nothing(layout: Layout, secure: SecurePlan, held_out: tuple[Metric, ...]) -> Summand:
    """What a client adds whose update is no number: none of it, at the least weight. Raises Declined."""
    values: dict[str, Number] = {summand.CLIENTS: 1, summand.WEIGHT: 1, summand.CLIPPED: 1}
    return Summand(np.zeros(layout.size, layout.dtype), _numbers(layout, values | summand.measured(held_out, secure.weight_cap)))


def of_measurements(layout: Layout, secure: SecurePlan, held_out: tuple[Metric, ...]) -> Summand:
    """What was measured, and no update. Raises Declined."""
    values: dict[str, Number] = {summand.CLIENTS: 1}
    return Summand(np.empty(0, layout.dtype), _numbers(layout, values | summand.measured(held_out, secure.weight_cap)))


def of_moments(layout: Layout, moments: Moments) -> Summand:
    """The sums and the sums of squares that these moments are of. Raises Declined."""
    values: dict[str, Number] = {summand.CLIENTS: 1, summand.COUNT: int(moments.count)}
    for number, (mean, m2) in enumerate(zip(moments.mean.tolist(), moments.m2.tolist(), strict=True)):
        total = Fraction(mean) * int(moments.count)
        values |= dict(zip(summand.feature_sums(number), (total, Fraction(m2) + total * Fraction(mean)), strict=True))
    return Summand(np.empty(0, layout.dtype), _numbers(layout, values))


def of_features(layout: Layout, features: NDArray[np.floating]) -> Summand:
    """The sums and the sums of squares of features `(n, d)`: exact, if those are float32. Raises Declined."""
    values: dict[str, Number] = {summand.CLIENTS: 1, summand.COUNT: len(features)}
    with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is declined
        for number, feature in enumerate(features.astype(np.float64).T):
            sums = _sum(feature), _sum(np.square(feature))
            values |= dict(zip(summand.feature_sums(number), sums, strict=True))
    return Summand(np.empty(0, layout.dtype), _numbers(layout, values))


def _shrink(blocks: Blocks, max_norm: float) -> float:
    """By what an update is multiplied so that it is no longer than allowed; 1 at the most."""
    if max_norm == 0:
        return 1.0
    norm = math.sqrt(sum(float(np.square(block, dtype=np.float64).sum()) for block in blocks()))
    if norm <= max_norm:
        return 1.0
    log.warning("update shortened", norm=norm, max_norm=max_norm)
    return max_norm / norm


def _sum(terms: NDArray[np.float64]) -> Number:
    """To twice the digits of a float64: the variance is the difference of two such sums, and may be small beside both."""
    if not np.isfinite(about := float(terms.sum())):
        return about
    each = terms.tolist()
    high = math.fsum(each)
    return Fraction(high) + Fraction(math.fsum((*each, -high)))


def _numbers(layout: Layout, values: Mapping[str, Number]) -> NDArray[np.uint64]:
    try:
        return layout.numbers(values)
    except ValueError as error:
        raise Declined(f"{error}: scale the features or the metrics of the task") from error
