"""The model that the federation trains, as the coordinator holds it: on the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from choral.elements import Buffer, decode, encode
from choral.errors import ConfigError
from choral.manifest import Entry
from choral.statistics import Moments
from numpy.typing import NDArray
from safetensors import SafetensorError

from choral_server.blueprint import Blueprint
from choral_server.checkpoint_file import BLOCK, CheckpointFile

_VARIANCE = "running_var"  # of a BatchNorm layer: noise, or a server optimizer's momentum, must not make it negative
Step = Callable[[NDArray[np.float32], int], NDArray[np.float32]]
"""The next weights of a stretch of the flat vector, from its present weights and where it begins."""


class GlobalModel:
    """One task's model with its present weights, which are those of a checkpoint file."""

    def __init__(self, blueprint: Blueprint) -> None:
        self.blueprint = blueprint
        self.manifest = blueprint.manifest
        self._file: CheckpointFile | None = None

    @property
    def features(self) -> int | None:
        """How many features a statistics round measures; None: the model wants none."""
        statistics = self.blueprint.statistics
        return statistics[0].size if statistics is not None else None

    @property
    def standardizes(self) -> bool:
        """Whether the statistics of a round are in it. Raises OSError."""
        if (statistics := self.blueprint.statistics) is None:
            return False
        mean, scale = (self._elements(entry, 0, entry.size) for entry in statistics)
        return bool(mean.any() or (scale != 1).any())

    def load(self, path: Path) -> None:
        """Take the state from a safetensors file. Raises ConfigError: it is damaged, or belongs to another model."""
        try:
            file = CheckpointFile(path)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path}: cannot be loaded ({error}): restore it, or give the run another name") from error
        if (difference := self._difference(file)) is not None:
            of = f"{self.blueprint.task} {self.blueprint.version}"
            raise ConfigError(f"{path}: is not of task {of}: {difference}; give the run another name")
        self._file = file

    def write(self, path: Path, metadata: Mapping[str, str]) -> bytes:
        """Write its state as it is to another file, for good; the SHA-256. Raises OSError, as the next two do."""
        return self._present.write_like(path, metadata, {})

    def write_trained(self, path: Path, metadata: Mapping[str, str], step: Step) -> bytes:
        """Write the state after a `step` of all that is averaged, as float32 whatever its dtype; all else stays as it is."""
        averaged = {entry.name: self._stepped(entry, step) for entry in self.manifest.averaged}
        return self._present.write_like(path, metadata, averaged)

    def write_standardized(self, path: Path, metadata: Mapping[str, str], moments: Moments) -> bytes:
        """Write the state with means and deviations of the raw features in it, if the model wants them."""
        changed = {}
        if (statistics := self.blueprint.statistics) is not None:
            kept = list(self.blueprint.keep)
            for entry, values, neutral in zip(statistics, (moments.mean, moments.deviation), (0.0, 1.0), strict=True):
                values = values.copy()
                values[kept] = neutral
                changed[entry.name] = [encode(values, entry.dtype)]
        return self._present.write_like(path, metadata, changed)

    @property
    def _present(self) -> CheckpointFile:
        assert self._file is not None, "a version is loaded first"
        return self._file

    def _elements(self, entry: Entry, start: int, stop: int) -> NDArray[np.float32]:
        file = self._present
        return decode(file.read(file.tensors[entry.name], start, stop), entry.dtype)

    def _stepped(self, entry: Entry, step: Step) -> Iterator[Buffer]:
        for start in range(0, entry.size, BLOCK):
            weights = self._elements(entry, start, min(start + BLOCK, entry.size))
            after = step(weights, entry.offset + start)
            yield encode(np.maximum(after, 0) if entry.name.endswith(_VARIANCE) else after, entry.dtype)

    def _difference(self, file: CheckpointFile) -> str | None:
        """How a file differs from the model, or None."""
        ours = {entry.name: f"{entry.dtype} {list(entry.shape)}" for entry in self.manifest.entries}
        theirs = {name: str(tensor) for name, tensor in file.tensors.items()}
        for name in [*ours, *theirs]:
            if ours.get(name) != theirs.get(name):
                return f"tensor {name} is {theirs.get(name, 'missing')} where {ours.get(name, 'nothing')} is expected"
        return None
