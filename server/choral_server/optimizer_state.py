"""What a server optimizer carries from one version to the next, in a file beside the version: vectors as long as the model."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from choral.durable import Steadily
from choral.errors import ConfigError
from safetensors import SafetensorError

from choral_server.checkpoint_file import CheckpointFile, header
from choral_server.strategies import State


class OptimizerState:
    """The vectors in a file, float32 `(size,)`."""

    def __init__(self, path: Path, size: int, source: str) -> None:
        """Raises ConfigError: what `source` names is damaged, or of a model of another size.

        NumPy would add a vector of one element to one of any size, and the model would be another without a word.
        """
        cure = "restore a backup, or give the run another name"
        try:
            self._file = CheckpointFile(path)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{source}: is damaged ({error}): {cure}") from error
        for name, vector in self._file.tensors.items():
            if (vector.dtype, vector.shape) != ("F32", (size,)):
                raise ConfigError(f"{source}: {name} is {vector} where F32 [{size}] is expected; {cure}")

    def part(self, start: int, stop: int) -> State:
        """The elements from `start` to `stop` of each vector. Raises OSError."""
        return {name: np.frombuffer(self._file.read(one, start, stop), "<f4") for name, one in self._file.tensors.items()}

    def copy(self, path: Path) -> None:
        """Write it to another file, for good. Raises OSError."""
        self._file.write_like(path, {}, {})


class StateWriter:
    """Writes such a file part by part, in any order; no file if the optimizer carries nothing. Raises OSError."""

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._size = size
        self._file: Steadily | None = None
        self._begin: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.__exit__(kind, error, trace)

    def write(self, start: int, part: State) -> None:
        """Write the elements from `start` on of each vector."""
        if part and self._file is None:
            self._file = Steadily(self._path)
            self._file.write(self._head(sorted(part)), 0)
        for name, vector in part.items():
            assert self._file is not None
            self._file.write(vector.astype("<f4", copy=False).data.cast("B"), self._begin[name] + 4 * start)

    def _head(self, names: list[str]) -> bytes:
        length = 4 * self._size
        offsets = {name: [number * length, (number + 1) * length] for number, name in enumerate(names)}
        head = header({name: {"dtype": "F32", "shape": [self._size], "data_offsets": offsets[name]} for name in names})
        self._begin = {name: len(head) + begin for name, (begin, _) in offsets.items()}
        return head
