"""The manifest: names, types, shapes and offsets of a state dict, so that two parties know that they mean the same model."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest

_TOLD_DIMENSIONS, _TOLD = 8, 200  # of an entry: how many dimensions, and characters of a name, are told


class EntryKind(enum.Enum):
    """What federated averaging does with a tensor."""

    AVERAGED = "averaged"  # floating point: part of the flat vector
    COUNTER = "counter"  # integer or boolean: keeps the coordinator's value
    STATISTIC = "statistic"  # filled once by the statistics round


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: `dtype` as safetensors writes it, `shape` and `offset` (into the flat vector) in elements."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    kind: EntryKind

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        """For people, and in few words: a stranger's entry may have a name, or dimensions, by the million."""
        shape = f"{list(self.shape)}" if len(self.shape) <= _TOLD_DIMENSIONS else f"[{len(self.shape)} dimensions]"
        return f"{_brief(self.name)} {_brief(self.dtype)} {shape} ({self.kind.value})"


@dataclass(frozen=True)
class Manifest:
    """All tensors of a model, in the order of its state dict."""

    entries: tuple[Entry, ...]

    @cached_property
    def averaged(self) -> tuple[Entry, ...]:
        """The entries that make up the flat vector."""
        return tuple(entry for entry in self.entries if entry.kind is EntryKind.AVERAGED)

    @cached_property
    def size(self) -> int:
        """Length of the flat vector, in elements."""
        return sum(entry.size for entry in self.averaged)


def first_difference(ours: Manifest, theirs: Manifest) -> str | None:
    """Name the first entry in which the two manifests differ, or None if they are equal."""
    for index, (mine, other) in enumerate(zip_longest(ours.entries, theirs.entries)):
        if mine != other:
            return f"entry {index} is {other or 'missing'} where {mine or 'nothing'} is expected"
    return None


def _brief(name: str) -> str:
    return name if len(name) <= _TOLD else f"{name[: _TOLD - 1]}…"
