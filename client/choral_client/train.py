"""The local loop."""

from __future__ import annotations

import math
import threading
from contextlib import suppress
from typing import Any

import torch
from choral.errors import Declined
from choral.evaluation import batches
from choral.plan import Training
from choral.task import Task, user_code
from torch import nn
from torch.utils.data import Dataset


class Stopped(BaseException):  # not an error of the task's code, so `user_code` lets it pass
    """The work is no longer wanted."""


def make_ready(task: Task) -> None:
    """Make the task's optimizer once: the first of torch.optim imports torch's compiler, for which a round would have to wait."""
    with suppress(Exception):  # if it cannot be made, the round says so
        task.optimizer([nn.Parameter(torch.zeros(1))], task.training.learning_rate)


def fit(
    task: Task, model: nn.Module, examples: Dataset[Any], training: Training, seed: int, stop: threading.Event | None = None
) -> float | None:
    """Train `model` in place; returns the mean loss of the last epoch, None for zero epochs.

    Everything random comes from `seed`. Raises Declined: the loss is no finite number; TaskError: the task's code raised;
    Stopped: `stop` was set.
    """
    shuffle = torch.Generator().manual_seed(seed)
    mean_loss: float | None = None
    if training.epochs == 0:
        return mean_loss
    with torch.random.fork_rng(devices=[]), user_code(f"task {task.name}: training"):
        torch.manual_seed(seed)
        optimizer = task.optimizer(model.parameters(), training.learning_rate)
        model.train()
        for epoch in range(1, training.epochs + 1):
            total, count = 0.0, 0
            for x, y in batches(examples, training.batch_size, shuffle):
                if stop is not None and stop.is_set():
                    raise Stopped
                optimizer.zero_grad()
                loss = task.loss(model(x), y)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                total, count = total + loss.item() * len(y), count + len(y)
            mean_loss = total / count
            if not math.isfinite(mean_loss):
                raise Declined(
                    f"the loss is {mean_loss} in epoch {epoch} of {training.epochs}: "
                    f"lower the learning rate ({training.learning_rate:g}), or look at this client's data"
                )
    return mean_loss
