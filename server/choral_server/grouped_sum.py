"""Several secure sums in place of one, and the median over them: whoever sends nonsense spoils one group's sum and not the model.

The entry-wise median of the groups' means (Yin et al. 2018, ICML, with groups for clients): as long as fewer than half of the
groups have a member that lies, each entry lies between two that honest groups have. The price is that the coordinator sees the sums
of smaller groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from choral.metrics import Metric, weighted_mean
from numpy.typing import NDArray

from choral_server.masked_sum import MaskedSum
from choral_server.rounds import Part


class GroupedSum:
    """The aggregate of a training round: `sums` by group. Which group is a client's is said once that is known."""

    def __init__(self, sums: Sequence[MaskedSum]) -> None:
        self.sums = sums
        self._groups: Mapping[str, int] = {}
        self._good: list[MaskedSum] = []

    def divide(self, groups: Mapping[str, int]) -> None:
        """The group of each client."""
        self._groups = groups

    def fold(self, part: Part, path: Path) -> None:
        """Add the masked result in the file at `path` to the sum of its client's group."""
        self.sums[self._groups[part.client]].fold(part, path)

    def close(self, good: Sequence[int]) -> None:
        """These groups' masks are off; the others' sums came to nothing."""
        self._good = [self.sums[group] for group in good]

    def mean(self, start: int = 0, stop: int | None = None) -> NDArray[np.float64]:
        """The median over the groups of their means: of the elements from `start` to `stop`, or of all `(size,)`."""
        median: NDArray[np.float64] = np.median([each.mean(start, stop) for each in self._good], axis=0)
        return median

    def held_out(self) -> tuple[Metric, ...]:
        """What all groups' clients measured, together."""
        return weighted_mean(metric for each in self._good for metric in each.held_out())

    @property
    def clipped(self) -> int:
        """How many clients had to clip or shorten their update."""
        return sum(each.clipped for each in self._good)
