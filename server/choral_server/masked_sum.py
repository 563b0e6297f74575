"""The aggregate of a round that is summed securely: masked results are added as they come, and the masks taken off at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from choral.errors import ChoralError
from choral.metrics import Metric
from choral.plan import SecurePlan
from choral.secagg import summand, wide
from choral.secagg.fixed_point import FixedPoint
from choral.secagg.masks import Mask
from choral.secagg.summand import Layout
from choral.statistics import Moments
from numpy.typing import NDArray

from choral_server.intake import MAX_EXAMPLES
from choral_server.rounds import Part

_BLOCK = 1 << 18  # elements
_ALMOST = Fraction(999_999, 1_000_000)  # of what clients have rounded
_ROUNDING = 1.001  # a norm may be longer by what the clients' and our rounding makes of it


class BadSum(ChoralError):
    """What is left when the masks are off cannot be the sum of what was asked for."""


class MaskedSum:
    """Σ of results laid out as `layout` and scaled by `scale`, on the terms of `plan`; `metrics` are those that are measured."""

    def __init__(self, layout: Layout, scale: FixedPoint, plan: SecurePlan, metrics: Sequence[str]) -> None:
        self._layout = layout
        self._scale = scale
        self._plan = plan
        self._metrics = metrics
        self._sum = layout.zero()
        self._numbers: dict[str, Fraction] = {}
        self.contained: frozenset[str] = frozenset()

    def fold(self, part: Part, path: Path) -> None:
        """Add the masked result in the file at `path`, the accepted one of `part`."""
        self._sum.add_file(path)
        self.contained |= {part.assignment}

    def unmask(self, mask: Mask) -> None:
        """Take the masks off; from then on it can be read. Raises BadSum: some client has sent something else than it should."""
        self._sum.add_mask(mask)
        steps = 1 << wide.FRACTION_BITS
        whole = [Fraction(number, steps) for number in wide.integers(self._sum.numbers)]
        self._numbers = dict(zip(self._layout.names, whole, strict=True))
        self._check_numbers()
        if self._layout.size:
            self._check_vector()

    def mean(self, start: int = 0, stop: int | None = None) -> NDArray[np.float64]:
        """The mean of the updates, weighted by examples: of the elements from `start` to `stop`, or of all `(size,)`."""
        return self._scale.decode(self._sum.vector[start:stop]) * (self._plan.weight_cap / float(self._numbers[summand.WEIGHT]))

    def moments(self) -> Moments:
        """Of all clients' examples together: from exact sums, so that nothing is lost to cancellation."""
        count, means, m2 = self._numbers[summand.COUNT], list[float](), list[float]()
        for number in range((len(self._layout.names) - 2) // 2):
            total, squares = (self._numbers[name] for name in summand.feature_sums(number))
            means.append(float(total / count))
            m2.append(max(0.0, float(squares - total * total / count)))
        return Moments(float(count), np.array(means), np.array(m2))

    def held_out(self) -> tuple[Metric, ...]:
        """What the clients measured, as means over all their held-out examples."""
        zero = Fraction(0)
        sums = [(name, [self._numbers.get(of, zero) for of in summand.metric_sums(name)]) for name in self._metrics]
        return tuple(Metric(name, float(total / count), int(count)) for name, (count, total) in sums if count)

    @property
    def clipped(self) -> int:
        """How many clients had to clip or shorten their update."""
        return int(self._numbers.get(summand.CLIPPED, 0))

    def _check_numbers(self) -> None:
        clients, cap = len(self.contained), self._plan.weight_cap
        self._must_be(summand.CLIENTS, clients, clients)
        for name, number in self._numbers.items():
            if not abs(number) <= clients * wide.LARGEST:
                raise BadSum(f"the sum of {name!r} is {float(number):g}, which {clients} clients cannot have sent: {_WHY}")
        if summand.WEIGHT in self._numbers:
            self._must_be(summand.WEIGHT, clients, clients * cap)
            self._must_be(summand.CLIPPED, 0, clients)
        if summand.COUNT in self._numbers:
            self._must_be(summand.COUNT, clients, clients * MAX_EXAMPLES)
            self._check_features()
        for name in self._metrics:
            examples, _ = summand.metric_sums(name)
            if examples in self._numbers:
                self._must_be(examples, 0, clients * cap)
        for metric in self.held_out():
            if abs(metric.value) > summand.LARGEST:
                raise BadSum(f"the mean of {metric.name!r} is {metric.value:g} where at most {summand.LARGEST:g} can be: {_WHY}")

    def _check_features(self) -> None:
        """A mean beyond what a plain round takes, or squares that are too small for it, would be in the model for good."""
        count = self._numbers[summand.COUNT]
        for number in range((len(self._layout.names) - 2) // 2):
            total, squares = (self._numbers[name] for name in summand.feature_sums(number))
            least = total * total / count
            if abs(total / count) > summand.LARGEST or squares / count > summand.LARGEST**2 or squares < least * _ALMOST:
                raise BadSum(
                    f"the values of feature {number} sum to {float(total):g} and their squares to {float(squares):g}, of "
                    f"{float(count):g} examples: {_WHY}"
                )

    def _must_be(self, name: str, least: float, most: float) -> None:
        number = self._numbers[name]
        if not least <= number <= most or number.denominator != 1:
            raise BadSum(f"the sum of {name!r} is {float(number):g} where {_span(least, most)} can be: {_WHY}")

    def _check_vector(self) -> None:
        square, largest = 0.0, 0.0
        for start in range(0, self._layout.size, _BLOCK):
            block = self._scale.decode(self._sum.vector[start : start + _BLOCK])
            largest = max(largest, float(np.abs(block).max()))
            square += float(np.dot(block, block))
        weight = float(self._numbers[summand.WEIGHT]) / self._plan.weight_cap
        most = weight * self._plan.clip + self._scale.error
        if largest > most:
            raise BadSum(f"an entry of the sum of updates is {largest:g} where at most {most:g} can be: {_WHY}")
        if self._plan.max_norm:
            longest = weight * self._plan.max_norm * _ROUNDING + self._scale.error * math.sqrt(self._layout.size)
            if square > longest**2:
                raise BadSum(
                    f"the sum of updates has a norm of {math.sqrt(square):g} where at most {longest:g} can be "
                    f"(run.max_update_norm): {_WHY}"
                )


_WHY = "some client has sent something else than it should, and nobody can see which"


def _span(least: float, most: float) -> str:
    return f"{least:g}" if least == most else f"{least:g} to {most:g}"
