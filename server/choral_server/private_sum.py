"""The sum of a private round: each update shortened to the clip before it counts, and noise on the sum before anyone reads it.

McMahan et al. 2018 (ICLR), algorithm 1: clients weigh alike, and the sum is divided by how many were expected, not by how many
came: so one client, whatever it sends, moves the sum by the clip and nothing else. All that is averaged counts towards an update's
length, buffers too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from choral.privacy.noise import STEPS, Noise
from choral.privacy.told import SHORTER
from numpy.typing import NDArray

from choral_server.aggregate import WeightedSum
from choral_server.payload import decoded
from choral_server.rounds import Part


@dataclass(frozen=True, slots=True)
class Terms:
    """What one round's sum is made on.

    Updates have a norm of `clip` at the most; `noise` is the standard deviation on their sum in clips; `expected` is how many
    clients are expected. `clip_noise`, if the clip follows the updates, is the same for how many were shortened, where a client
    moves ½.
    """

    clip: float
    noise: float
    expected: int
    clip_noise: float | None = None


class PrivateSum:
    """The sum of updates of `size` float32 elements on these `terms`; integers, in steps of which the noise has `STEPS`."""

    def __init__(self, size: int, terms: Terms, source: Noise) -> None:
        steps = STEPS / (terms.noise * terms.clip)
        self._terms = terms
        self._size = size
        self._source = source
        self._sum = WeightedSum(size, 1, steps)
        assert steps > 0, "the configuration bounds noise and clip"
        self._longest = (terms.clip - math.sqrt(size) / 2 / steps) * SHORTER  # so that rounding leaves it within the clip
        self._within: float | None = None
        self._noised = False

    @property
    def contained(self) -> frozenset[str]:
        """The assignments whose updates are in it."""
        return self._sum.contained

    def fold(self, part: Part, path: Path) -> None:
        """Add the update in the file at `path`, the accepted result of `part`, no longer than the clip."""
        blocks = (block for _, block in decoded(path, part.codec, self._size))
        norm = math.sqrt(sum(float(np.square(block, dtype=np.float64).sum()) for block in blocks))
        self._sum.fold(part, path, self._longest / norm if norm > self._longest else 1.0)

    def save(self, path: Path) -> None:
        """Write the sum, before there is noise on it; as `WeightedSum.save`."""
        assert not self._noised, "what was noised once is written as a version, and nowhere else"
        self._sum.save(path)

    def load(self, path: Path) -> None:
        """Take the sum as it was saved. Raises as `WeightedSum.load`."""
        self._sum.load(path)

    def release(self) -> None:
        """Put the noise on it, once: from then on it may be read. Slow for large models: call it in a thread."""
        if self._noised:
            return
        self._sum.add(self._source)
        if self._terms.clip_noise is not None:
            self._within = self._noised_share(self._terms.clip_noise)
        self._noised = True

    def _noised_share(self, noise: float) -> float:
        """Of updates no longer than the clip: from a sum of integers too, to which each client adds one or its negative."""
        each = int(STEPS / noise)
        shortened = len(self._sum.shortened)
        total = each * (len(self.contained) - 2 * shortened) + int(self._source(1)[0])
        return 0.5 + total / (2 * each * self._terms.expected)

    def mean(self, start: int = 0, stop: int | None = None) -> NDArray[np.float64]:
        """The noised sum over the clients expected: of the elements from `start` to `stop`, or of all `(size,)`."""
        assert self._noised, "nobody reads it before there is noise on it"
        return self._sum.total(start, stop) / self._terms.expected

    @property
    def within(self) -> float | None:
        """The noised share of updates that were no longer than the clip; None: the clip does not follow them."""
        return self._within
