"""Measuring a model: its loss and the task's metrics over a dataset."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from choral.metrics import LOSS, Metric
from choral.task import Task, user_code

_BATCH = 1024


def evaluate(task: Task, model: nn.Module, examples: Dataset[Any]) -> tuple[Metric, ...]:
    """Loss and metrics over all examples, in evaluation mode. Raises TaskError: the task's code raised."""
    with user_code(f"task {task.name}: evaluation"), torch.inference_mode(), evaluating(model):
        pairs = [(model(x), y) for x, y in batches(examples, _BATCH)]
        prediction, target = (torch.cat(side) for side in zip(*pairs, strict=True))
        measured = {LOSS: task.loss} | dict(task.metrics)
        return tuple(Metric(name, float(measure(prediction, target)), len(target)) for name, measure in measured.items())


def batches(examples: Dataset[Any], batch_size: int, shuffle: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs (x, y) of at most `batch_size` examples, in order or shuffled by a generator. A TensorDataset is indexed directly."""
    if isinstance(examples, TensorDataset):
        x, y = examples.tensors
        order = torch.randperm(len(x), generator=shuffle) if shuffle is not None else torch.arange(len(x))
        for start in range(0, len(x), batch_size):
            index = order[start : start + batch_size]
            yield x[index], y[index]
    else:
        yield from DataLoader(examples, batch_size, shuffle=shuffle is not None, generator=shuffle)


class evaluating:  # noqa: N801 - reads as `with evaluating(model)`
    """Context in which `model` is in evaluation mode."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._was_training = model.training

    def __enter__(self) -> None:
        self._model.eval()

    def __exit__(self, *_: object) -> None:
        self._model.train(self._was_training)
