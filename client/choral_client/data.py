"""The private shard: examples to train on and examples held out to measure with."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from choral.errors import DataError, TaskError
from choral.evaluation import batches
from choral.task import Task
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset


@dataclass(frozen=True)
class Shard:
    """A client's examples, in two parts that do not overlap."""

    training: Dataset[Any]
    held_out: Dataset[Any] | None
    size: int
    """number of training examples"""

    def features(self) -> Tensor:
        """The raw features of the training examples `(n, d)`."""
        return torch.cat([x.reshape(len(x), -1) for x, _ in batches(self.training, 1024)])


def load_shard(task: Task, path: Path, holdout: float) -> Shard:
    """Load the shard and hold out a share of it: always the same rows of the same file.

    Raises DataError: the file cannot be used, or too little is left to train on. TaskError: the task's code raised.
    """
    examples = task.examples(path)
    if not isinstance(examples, Sized):
        raise TaskError(f"task {task.name}: load() gave a {type(examples).__name__}; a map-style Dataset with a length is needed")
    count = len(examples)
    held = int(count * holdout)
    if count - held < 1:
        raise DataError(f"{path}: {count} examples leave none to train on; at least one is needed")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    held_out = _part(examples, order[:held]) if held else None
    return Shard(_part(examples, order[held:]), held_out, count - held)


def _part(examples: Dataset[Any], index: Tensor) -> Dataset[Any]:
    if isinstance(examples, TensorDataset):  # stays one, so that batches are cut by indexing
        return TensorDataset(*(tensor[index] for tensor in examples.tensors))
    return Subset(examples, index.tolist())
