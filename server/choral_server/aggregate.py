"""Fold updates into one exact sum, in memory that depends on the model alone.

Each weighted update is rounded once to a 64-bit fixed point and added as integers, so neither the order of arrival nor any grouping
changes a bit of the result. The smallest step is 2^-46 of the weight cap.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from choral.durable import write_durably
from numpy.typing import NDArray

from choral_server.payload import decoded
from choral_server.rounds import Part

FRACTION_BITS = 46
_BLOCK = 1 << 18  # elements
_NOTHING: tuple[int, list[str], list[str]] = (0, [], [])


def entry_bound(cohort_size: int) -> float:
    """Largest magnitude of an update's entry for which `cohort_size` updates of weight 1 cannot overflow 63 bits."""
    return float(2 ** (62 - FRACTION_BITS)) / cohort_size


class WeightedSum:
    """Σ rint(Δᵢ · min(nᵢ, cap)/cap · steps), exactly, for vectors of `size` float32 elements; nᵢ and `weight_cap` in examples.

    `contained` are the assignments whose updates are in it, `shortened` those of them that were made shorter.
    """

    def __init__(self, size: int, weight_cap: int, steps: float = 2.0**FRACTION_BITS) -> None:
        self._sum = np.zeros(size, dtype=np.int64)
        self._cap = weight_cap
        self._steps = steps
        self._weight = 0
        self.contained: frozenset[str] = frozenset()
        self.shortened: frozenset[str] = frozenset()

    def emptied(self) -> WeightedSum:
        """Itself, with nothing in it: so many bytes fresh from the system cost more than to be zeroed again."""
        self._sum.fill(0)
        self._weight = 0
        self.contained = self.shortened = frozenset()
        return self

    def fold(self, part: Part, path: Path, shrink: float = 1.0) -> None:
        """Add the update in the file at `path`, the accepted result of `part`, multiplied by `shrink`."""
        weight = min(part.examples, self._cap)
        scale = weight / self._cap * self._steps * shrink
        for start, values in decoded(path, part.codec, self._sum.size):  # in blocks, so that the temporaries stay in the cache
            block = values.astype(np.float64)
            np.multiply(block, scale, out=block)
            np.rint(block, out=block)
            self._sum[start : start + block.size] += block.astype(np.int64)
        self._weight += weight
        self.contained |= {part.assignment}
        if shrink < 1:
            self.shortened |= {part.assignment}

    def add(self, integers: Callable[[int], NDArray[np.int64]]) -> None:
        """Add so many integers, in steps, to all elements, block by block."""
        for start in range(0, self._sum.size, _BLOCK):
            block = self._sum[start : start + _BLOCK]
            block += integers(block.size)

    def total(self, start: int = 0, stop: int | None = None) -> NDArray[np.float64]:
        """The sum itself: of the elements from `start` to `stop`, or of all `(size,)`."""
        return np.multiply(self._sum[start:stop], 1 / self._steps, dtype=np.float64)

    def mean(self, start: int = 0, stop: int | None = None) -> NDArray[np.float64]:
        """The mean of what was folded, weighted by examples: of the elements from `start` to `stop`, or of all `(size,)`."""
        return np.multiply(self._sum[start:stop], self._cap / (self._weight * self._steps), dtype=np.float64)

    def save(self, path: Path) -> None:
        """Write the sum so that it is there, whole, when this returns: a line of JSON, then the integers, little-endian."""
        content = self._sum.astype("<i8", copy=False).data.cast("B")
        about = {
            "size": self._sum.size,
            "cap": self._cap,
            "weight": self._weight,
            "steps": self._steps,
            "contained": sorted(self.contained),
            "shortened": sorted(self.shortened),
            "crc32": zlib.crc32(content),
        }
        write_durably(path, json.dumps(about).encode() + b"\n", content)

    def load(self, path: Path) -> None:
        """Take the sum as it was saved. Raises ValueError: the file is damaged, or of another model or weight cap."""
        with path.open("rb") as file:
            first = file.readline()
            found = np.fromfile(file, dtype="<i8")
        size, cap = self._sum.size, self._cap
        expected = {"size": size, "cap": cap, "steps": self._steps, "crc32": zlib.crc32(found.data)}
        weight, contained, shortened = _about(first, expected) if found.size == size else _NOTHING
        if weight < 1:
            raise ValueError(f"{path} is damaged, or not a sum of {size} elements with a weight cap of {cap}")
        self._sum, self._weight = found.astype(np.int64, copy=False), weight
        self.contained, self.shortened = frozenset(contained), frozenset(shortened)


def _about(line: bytes, expected: dict[str, float]) -> tuple[int, list[str], list[str]]:
    """What the first line of a sum says of it: its weight, what it contains, and what it shortened; nothing if it says else."""
    try:
        about = json.loads(line)
        about = {"steps": 2.0**FRACTION_BITS, "shortened": []} | about  # an earlier release does not say these
        weight, contained, shortened = about["weight"], about["contained"], about["shortened"]
        mine = {name: about[name] for name in expected}
    except (KeyError, TypeError, ValueError, RecursionError):
        return _NOTHING
    named = all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in (contained, shortened))
    good = mine == expected and named and isinstance(weight, int) and weight <= 2**62
    return (weight, contained, shortened) if good else _NOTHING
