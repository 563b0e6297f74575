"""Fold updates into one exact sum, in memory that depends on the model alone.

Each weighted update is rounded once to a 64-bit fixed point and added as integers, so neither the order of arrival nor any grouping
changes a bit of the result. The smallest step is 2^-46 of the weight cap.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FRACTION_BITS = 46
_BLOCK = 1 << 18  # elements converted at a time: the temporaries stay in the cache


def entry_bound(cohort_size: int) -> float:
    """Largest magnitude of an update's entry for which `cohort_size` updates of weight 1 cannot overflow 63 bits."""
    return float(2 ** (62 - FRACTION_BITS)) / cohort_size


class WeightedSum:
    """Σ rint(Δᵢ · min(nᵢ, cap)/cap · 2^46), exactly, for vectors of `size` float32 elements; nᵢ and `weight_cap` in examples."""

    def __init__(self, size: int, weight_cap: int) -> None:
        self._sum = np.zeros(size, dtype=np.int64)
        self._cap = weight_cap
        self._weight = 0

    def fold(self, path: Path, examples: int) -> None:
        """Add the update in the file at `path` with a weight of `examples`."""
        weight = min(examples, self._cap)
        scale = weight / self._cap * 2.0**FRACTION_BITS
        delta = np.fromfile(path, dtype="<f4")
        for start in range(0, delta.size, _BLOCK):
            block = delta[start : start + _BLOCK].astype(np.float64)
            np.multiply(block, scale, out=block)
            np.rint(block, out=block)
            self._sum[start : start + _BLOCK] += block.astype(np.int64)
        self._weight += weight

    def mean(self) -> NDArray[np.float64]:
        """The mean of what was folded, weighted by examples, `(size,)`."""
        return np.multiply(self._sum, self._cap / (self._weight * 2.0**FRACTION_BITS), dtype=np.float64)
