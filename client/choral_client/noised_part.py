"""What this client tells in a private round whose noise clients add: its vector, in whole steps, with its part of the noise on it.

Whatever the coordinator makes of it, nothing leaves this device without that noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import structlog
from choral.codecs import Vector
from choral.errors import ConfigError, Declined
from choral.plan import Kind, Plan
from choral.privacy.noise import STEPS, Integers, Noise, gaussian
from choral.privacy.skellam import Skellam
from choral.privacy.told import Told, bounded, moments_behind_noise, scaled_moments, told_by
from choral.secagg.fixed_point import fixed_point
from choral.secagg.summand import CLIENTS, Layout, Summand
from choral.statistics import Moments
from numpy.typing import NDArray

log = structlog.get_logger()
Blocks = Callable[[], Iterator[Vector]]
"""The update, block by block, as often as it is asked for."""
Numbers = NDArray[np.float64]
NOTHING: Numbers = np.empty(0)


@dataclass(frozen=True, slots=True)
class NoisedPart:
    """A vector `told` by this client, in `steps` to 1, with this `noise`. Each element's is drawn once, when it is taken."""

    told: Told
    steps: float
    noise: Noise

    def update(self, blocks: Blocks) -> tuple[Iterator[Integers], bool]:
        """The update, shortened to the clip, block by block; and whether it had to be."""
        longest = self.told.longest(self.steps)
        norm = math.sqrt(sum(float(np.square(block, dtype=np.float64).sum()) for block in blocks()))
        if not math.isfinite(norm):  # of a version that is no number where the work replaces it, or beyond float32
            log.warning("no change is told", reason="the update holds an infinite or undefined number")
            return (self._noised(np.zeros(block.size)) for block in blocks()), True
        shrink = min(1.0, longest / norm) if norm else 1.0
        return (self._noised(np.rint(np.multiply(block, shrink * self.steps, dtype=np.float64))) for block in blocks()), shrink < 1

    def beside(self, numbers: Numbers, *, shortened: bool = False) -> Integers:
        """What is told beside it: `numbers` of -1 to 1, and whether it was shortened."""
        told = bounded(numbers) * (self.told.unit * self.steps)
        if self.told.clip_unit:
            told = np.append(told, (-1 if shortened else 1) * self.told.clip_unit * self.steps)
        return self._noised(np.trunc(told))  # never away from zero

    def beside_as_told(self, numbers: Numbers) -> Numbers:
        """The numbers beside the update with the noise on them, for whom nothing is summed."""
        return self.beside(numbers) / (self.told.unit * self.steps)

    def update_as_told(self, blocks: Blocks) -> Iterator[Vector]:
        """The update with the noise on it as float32, block by block, for whom nothing is summed."""
        for block in self.update(blocks)[0]:
            yield (block / self.steps).astype(np.float32)

    def _noised(self, whole: NDArray[np.floating[Any]]) -> Integers:
        return whole.astype(np.int64) + self.noise(whole.size)


def part_of(plan: Plan, size: int, names: int) -> NoisedPart:
    """What this client tells, of a model of `size` averaged elements, with so many `names` of metrics or features.

    Raises Declined: the plan asks for what would not be private, or cannot be right.
    """
    terms, secure = plan.private, plan.secure
    assert terms is not None, "only then"
    needed = names if plan.kind is not Kind.TRAINING or plan.evaluate else 0
    if len(terms.ranges) != needed:
        raise Declined(f"the coordinator gives {len(terms.ranges)} ranges for {needed} numbers that it asks for")
    try:
        told = told_by(plan, size)
        if secure is None:
            if terms.clients != 1:
                raise ConfigError(f"noise that is divided among {terms.clients} clients is enough only in a sum of so many")
            return _checked(NoisedPart(told, STEPS / told.deviation, gaussian()))
        if terms.clients > secure.least_clients:
            raise ConfigError(f"noise is divided among {terms.clients} clients, and as few as {secure.least_clients} may be summed")
        most = secure.most_clients
        fixed_point(most, told.largest(most, terms.clients), secure.ring_bits, secure.fraction_bits)
        steps = 2.0**secure.fraction_bits
        return _checked(NoisedPart(told, steps, Skellam((told.deviation * steps) ** 2 / terms.clients)))
    except (ConfigError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise Declined(f"the coordinator asks for noise that cannot be right: {error}") from error


def summand(part: NoisedPart, layout: Layout, blocks: Blocks | None, numbers: Numbers) -> Summand:
    """The whole vector as a term of a secure sum, without masks."""
    vector, start, shortened = np.empty(layout.size, layout.dtype), 0, False
    if blocks is not None:
        told, shortened = part.update(blocks)
        for block in told:
            vector[start : start + block.size] = block.astype(layout.dtype)  # modulo the ring
            start += block.size
    vector[start:] = part.beside(numbers, shortened=shortened).astype(layout.dtype)
    return Summand(vector, layout.numbers({CLIENTS: 1}))


def hidden_moments(features: NDArray[np.floating[Any]], ranges: tuple[tuple[float, float], ...], noise: float) -> Moments:
    """Moments of examples `(n, d)` in which no single one can be found: noise of `noise` over what one can move.

    As if of one example; how many there are is no secret. Raises Declined: there is not one range for each feature.
    """
    count, d = features.shape
    if len(ranges) != d:
        raise Declined(f"the coordinator gives {len(ranges)} ranges for {d} features")
    deviation = noise * math.sqrt(2 * d)
    steps, each = STEPS / deviation, scaled_moments(Moments(1.0, features.astype(np.float64), np.zeros(d)), ranges)
    total = np.trunc(each * steps).astype(np.int64).sum(axis=0)
    found = (total + gaussian()(2 * d)) / (steps * count)
    return moments_behind_noise(found, ranges, (deviation / count) ** 2, count)


def _checked(part: NoisedPart) -> NoisedPart:
    """Raises ConfigError."""
    if (reason := part.told.too_coarse(part.steps)) is not None:
        raise ConfigError(reason)
    return part
